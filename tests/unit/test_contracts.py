"""The floors of the architecture hold, and the contracts that guard them do catch a violation."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_vl", "launch", "data_tools")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60

# A module of the first room that imports from the second.
FORBIDDEN = [
    ("megatron_vl/config", "megatron_vl.device.machine"),
    ("megatron_vl/device", "megatron_vl.data.types"),
    ("megatron_vl/data", "megatron_vl.planning.layout"),
    ("megatron_vl/data", "megatron_vl.model.vlm"),
    ("megatron_vl/data", "megatron.core"),
    ("megatron_vl/planning", "torch"),
    ("megatron_vl/parallel", "megatron_vl.model.vlm"),
    ("megatron_vl/model", "megatron_vl.data.types"),
    ("megatron_vl/model", "megatron_vl.checkpoint.store"),
    ("megatron_vl/checkpoint", "megatron_vl.train.metrics"),
    ("megatron_vl/evaluate", "megatron_vl.train.loop"),
    ("megatron_vl/train", "megatron_vl.evaluate.heldout"),
    ("megatron_vl/train", "launch.ranks"),
    ("data_tools", "megatron_vl.model.vlm"),
]


def lint_imports(tree: Path) -> "subprocess.CompletedProcess[str]":
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(tree / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources to be spoiled."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def test_the_sources_keep_their_floors(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("room", "imported"), FORBIDDEN, ids=lambda value: value.split("/")[-1])
def test_a_violation_is_caught(tree: Path, room: str, imported: str) -> None:
    spoiled = tree / room / "spoiled.py"
    spoiled.write_text(f"import {imported}\n", encoding="utf-8")
    try:
        result = lint_imports(tree)
    finally:
        spoiled.unlink()
    assert result.returncode == 1, result.stdout
    assert "spoiled" in result.stdout


def test_a_new_room_needs_a_floor(tree: Path) -> None:
    room = tree / "megatron_vl/attic"
    room.mkdir()
    (room / "__init__.py").write_text("")
    try:
        result = lint_imports(tree)
    finally:
        shutil.rmtree(room)
    assert result.returncode == 1
    assert "attic" in result.stdout


def test_planning_runs_without_torch() -> None:
    modules = [
        f"megatron_vl.planning.{path.stem}" for path in (ROOT / "megatron_vl/planning").glob("[a-z]*.py")
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long, "\n".join(long)
