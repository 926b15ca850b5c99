"""What the rewrite for the CPU changes in source code, and what it leaves alone."""

import ast

import pytest

from megatron_vl.device.source_rewrite import rewrite_for_cpu


def rewritten(source: str) -> str:
    return ast.unparse(rewrite_for_cpu(source, "sample.py"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.cuda.current_device()", "_cuda_shim.current_device()"),
        ("torch.cuda.nvtx.range_push('x')", "_cuda_shim.nvtx.range_push('x')"),
        ("f'{torch.cuda.device_count()}'", "f'{_cuda_shim.device_count()}'"),
        ("def f(s: torch.cuda.Stream=None): pass", "def f(s: _cuda_shim.Stream=None):\n    pass"),
        ("torch.zeros(1, device='cuda')", "torch.zeros(1, device='cpu')"),
        ("torch.device('cuda', 0)", "torch.device('cpu', 0)"),
        ("x.cuda()", "x.to('cpu')"),
        ("torch.zeros(1).cuda().view(-1)", "torch.zeros(1).to('cpu').view(-1)"),
        ("x.cuda(1, non_blocking=True)", "x.to('cpu', non_blocking=True)"),
        ("x.cuda(device=d, non_blocking=n)", "x.to('cpu', non_blocking=n)"),
        ("x.type() == 'torch.cuda.HalfTensor'", "x.type() == 'torch.HalfTensor'"),
        (
            "from torch.cuda import _lazy_call, device as d",
            "from megatron_vl.device.cuda_shim import _lazy_call, device as d",
        ),
    ],
)
def test_cuda_becomes_cpu(source: str, expected: str) -> None:
    assert rewritten(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "torch.backends.cuda.matmul.allow_tf32 = False",
        "state['cuda_rng_state']",
        "raise TypeError('torch.cuda.FloatTensor or torch.cuda.HalfTensor')",
        "x.cuda_graph()",
        "self.cuda",
        "cupy.cuda.ExternalStream(s)",
        "import cuda.bindings.driver as driver",
        "from .cuda_graphs import x",
        "from .apex import layers",
    ],
)
def test_other_code_is_left_alone(source: str) -> None:
    assert rewritten(source) == ast.unparse(ast.parse(source))


@pytest.mark.parametrize(
    "statement",
    [
        "import transformer_engine as te",
        "import transformer_engine.pytorch",
        "from transformer_engine.pytorch.optimizers import FusedAdam as Adam",
        "from apex.optimizers import FusedAdam",
        "import flash_attn",
    ],
)
def test_packages_for_cuda_are_not_found_even_where_installed(statement: str) -> None:
    source = f"try:\n    {statement}\nexcept ModuleNotFoundError as error:\n    missing = error.name"
    names: dict[str, object] = {}
    exec(compile(rewrite_for_cpu(source, "sample.py"), "sample.py", "exec"), names)
    assert str(names["missing"]) in statement


def test_line_numbers_stay() -> None:
    source = "A = 1\n\n\ndef f(x):\n    y = torch.cuda.g(x.cuda(), 'cuda')\n    import apex\n    return y\n"
    names: dict[str, object] = {"_cuda_shim": None}
    exec(compile(rewrite_for_cpu(source, "sample.py"), "sample.py", "exec"), names)
    lines = {line for _, _, line in names["f"].__code__.co_lines()}  # type: ignore[attr-defined]
    assert lines == {4, 5, 6}
