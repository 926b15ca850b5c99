"""The check before any download: one line for each thing a machine may lack, with the fix."""

import ast
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools import preflight

SCRIPT = Path(preflight.__file__)
ENOUGH = ["--disk-gb", "0.001", "--memory-gb", "0.001"]


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def test_a_good_machine_passes_with_one_line_each() -> None:
    result = run(*ENOUGH)
    assert result.returncode == 0, result.stdout
    assert re.findall(r"^\[(\w+) *\] (\w+)", result.stdout, re.M) == [
        ("ok", subject) for subject in ("system", "python", "venv", "disk", "memory")
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--disk-gb", "1e9", "--memory-gb", "0.001"], r"\[fail\] disk .* needed: 1e\+09 GB; free some"),
        (["--disk-gb", "0.001", "--memory-gb", "1e9"], r"\[fail\] memory .* needed: 1e\+09 GB; close"),
    ],
)
def test_what_is_missing_stops_with_its_fix(arguments: list[str], line: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert [text for text in result.stdout.splitlines() if re.match(line, text)]
    assert result.stdout.count("[fail]") == 1


def test_a_disk_too_small_for_cuda_wheels_is_a_warning_that_names_the_way_round() -> None:
    result = run(*ENOUGH, "--cuda-wheels-gb", "1e9", "--target", "test")
    assert result.returncode == 0
    assert "[warn] disk" in result.stdout
    assert "make test TORCH_INDEX_URL=" in result.stdout


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor micro")
    monkeypatch.setattr(sys, "version_info", version(3, 9, 2))
    finding = preflight.check_python()
    assert finding.level == "fail"
    assert "3.9" in finding.text and "make PYTHON=python3.11" in finding.text
    monkeypatch.setattr(sys, "version_info", version(3, 11, 0))
    assert preflight.check_python().level == "ok"


def test_a_python_without_venv_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name)
    )
    finding = preflight.check_venv()
    assert (finding.level, "lacks ensurepip; apt install python3-venv" in finding.text) == ("fail", True)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(preflight, "CGROUP_LIMITS", (str(limit),))
    limit.write_text("max\n")
    assert preflight.available_memory_bytes() > 1e6
    limit.write_text("1000000\n")
    assert preflight.available_memory_bytes() == 1e6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in run(*ENOUGH, cwd=tmp_path).stdout


def test_the_script_runs_on_old_pythons() -> None:
    """It parses as Python 3.8 and imports the standard library alone."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)
