"""What only a GPU can show, on one: TransformerEngine's layers, bf16 and the loss against what the CPU's tests know."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from megatron_vl.model.vocabulary_loss import vocabulary_loss
from tests.support.gpus import needs_gpus, needs_transformer_engine
from tests.support.runs import build_data, command, finish, losses

pytestmark = needs_gpus(1)
BF16 = 2e-2  # of losses and gradient norms, relative
STEPS = 3


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    build_data(root, num_samples=24)
    return root


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def trained(data_root: Path, run: Path, *overrides: str) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of a short run, whose initial weights depend on the seed alone."""
    short = ["stages=[joint]", "data.warmup_fraction=0", f"train.steps={STEPS}", "heldout.max_samples=0"]
    status, output = finish(command(data_root, run, *short, *overrides))
    assert status == 0, output
    rows = losses(run)
    assert len(rows) == STEPS
    return rows


def assert_close(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=BF16)


@needs_transformer_engine
def test_transformer_engines_layers_train_as_the_local_ones(data_root: Path, tmp_path: Path) -> None:
    """Packed rows with images through flash or fused attention, against scaled_dot_product_attention."""
    fused = trained(data_root, tmp_path / "fused", "train.precision=bf16")
    local = trained(
        data_root, tmp_path / "local", "train.precision=bf16", "parallel.transformer_engine=false"
    )
    assert_close(fused, local)


def test_bf16_trains_as_fp32(data_root: Path, tmp_path: Path) -> None:
    local = "parallel.transformer_engine=false"
    bf16 = trained(data_root, tmp_path / "bf16", "train.precision=bf16", local)
    fp32 = trained(data_root, tmp_path / "fp32", "train.precision=fp32", local)
    assert_close(bf16, fp32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_loss(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Against torch's in fp64; S tokens, V vocabulary."""
    source = torch.Generator().manual_seed(0)
    logits_SV = (torch.randn(300, 8192, generator=source) * 5).to(dtype).cuda()
    labels_S = torch.randint(0, 8192, (300,), generator=source).cuda()
    exact_SV = logits_SV.double().requires_grad_()
    expected_S = cross_entropy(exact_SV, labels_S, reduction="none")
    expected_S.sum().backward()
    ours_SV = logits_SV.clone().requires_grad_()
    losses_S = vocabulary_loss(ours_SV * 1, labels_S, group)
    losses_S.sum().backward()
    torch.testing.assert_close(losses_S.double(), expected_S.detach(), rtol=1e-5, atol=1e-5)
    assert ours_SV.grad is not None and exact_SV.grad is not None
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours_SV.grad.double(), exact_SV.grad, rtol=rounding, atol=1e-6)
