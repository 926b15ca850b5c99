"""How the import hook treats megatron-core, on a stand-in package of that name in a fresh interpreter."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Names CUDA twice, tries TransformerEngine, and has an attribute that is mended where there is none.
OPTIMIZER = """
import torch
NAMED = "cuda"
STREAM = torch.cuda.Stream
try:
    import transformer_engine
    TRANSFORMER_ENGINE = True
except ImportError:
    TRANSFORMER_ENGINE = False
USING_PYTORCH_OPTIMIZER = True
"""

FACTS = """
from megatron.core import optimizer
import json, torch
print(json.dumps({
    "named": optimizer.NAMED,
    "stream": optimizer.STREAM.__module__,
    "transformer_engine": optimizer.TRANSFORMER_ENGINE,
    "mended": not optimizer.USING_PYTORCH_OPTIMIZER,
    "torch_cuda_is_untouched": before == vars(torch.cuda),
}))
"""
WITHOUT_CUDA = (
    "import megatron_vl, torch; torch.cuda.is_available = lambda: False; before = dict(vars(torch.cuda))\n"
)
WITH_CUDA = WITHOUT_CUDA.replace("False", "True")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of the stand-in for megatron.core, whose bytecode is on disk already, as pip leaves it."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "optimizer.py").write_text(OPTIMIZER)
    py_compile.compile(str(core / "optimizer.py"))
    return core


@pytest.fixture
def transformer_engine(tmp_path: Path) -> None:
    """TransformerEngine looks installed."""
    (tmp_path / "transformer_engine.py").touch()


def run(package: Path, script: str) -> str:
    """The output of a script which finds the stand-in."""
    environment = {**os.environ, "PYTHONPATH": f"{package.parents[1]}{os.pathsep}{ROOT}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def facts(package: Path, prologue: str) -> dict[str, Any]:
    return json.loads(run(package, prologue + FACTS))


def bytecode(package: Path) -> dict[str, bytes]:
    """Of the modules as they are."""
    return {path.name: path.read_bytes() for path in package.rglob("*.pyc") if ".opt-cpu" not in path.name}


def test_without_cuda_it_is_rewritten_and_runs_with_cuda_do_not_see_it(package: Path) -> None:
    before = bytecode(package)
    assert facts(package, WITHOUT_CUDA) == {
        "named": "cpu",
        "stream": "megatron_vl.device.cuda_shim",
        "transformer_engine": False,
        "mended": True,
        "torch_cuda_is_untouched": True,
    }
    assert bytecode(package) == before


def test_bytecode_of_what_was_rewritten_is_kept_until_the_source_changes(package: Path) -> None:
    first = facts(package, WITHOUT_CUDA)
    kept = package / "__pycache__" / f"optimizer.{sys.implementation.cache_tag}.opt-cpu.pyc"
    written = kept.stat()
    assert facts(package, WITHOUT_CUDA) == first
    assert kept.stat().st_ino == written.st_ino
    source = package / "optimizer.py"
    times = source.stat()
    source.write_text(OPTIMIZER.replace('NAMED = "cuda"', 'NAMED = "CUDA"'))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # as long and as old as before
    assert facts(package, WITHOUT_CUDA)["named"] == "CUDA"
    assert kept.stat().st_ino != written.st_ino


def test_bytecode_is_not_left_where_it_is_not_wanted(package: Path) -> None:
    facts(package, "import sys; sys.dont_write_bytecode = True\n" + WITHOUT_CUDA)
    assert not list(package.rglob("*.opt-cpu.pyc"))


@pytest.mark.usefixtures("transformer_engine")
def test_without_cuda_transformer_engine_is_not_imported(package: Path) -> None:
    found = facts(package, WITHOUT_CUDA)
    assert (found["transformer_engine"], found["mended"]) == (False, True)


def test_with_cuda_it_is_mended_but_not_rewritten(package: Path) -> None:
    found = facts(package, WITH_CUDA)
    assert (found["named"], found["stream"], found["mended"]) == ("cuda", "torch.cuda.streams", True)
    assert "__init__.cpython" in " ".join(bytecode(package)), "CUDA runs keep their bytecode"


@pytest.mark.usefixtures("transformer_engine")
def test_with_cuda_and_transformer_engine_it_is_as_it_is(package: Path) -> None:
    found = facts(package, WITH_CUDA)
    assert (found["named"], found["transformer_engine"], found["mended"]) == ("cuda", True, False)


def test_importing_the_package_looks_at_nothing(package: Path) -> None:
    script = "import megatron_vl.device, megatron_vl.device.import_hook, sys; print('torch' in sys.modules)"
    assert run(package, script).strip() == "False"


def test_megatron_core_imported_too_early_is_an_error(package: Path) -> None:
    script = (
        "import megatron.core\ntry:\n    import megatron_vl\nexcept ImportError as error:\n    print(error)"
    )
    assert "import megatron_vl first" in run(package, script)
