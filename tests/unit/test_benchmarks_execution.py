"""Generated programs: right ones pass, all others fail, and nothing outlives its time."""

import os
import time
from pathlib import Path

import pytest

from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmarks.execution import extract_code, grade_by_execution, passes
from megatron_vl.evaluate.items import Item

ITEM = Item(
    key="11", prompt=Sample(text="?"), references=("import math", "assert f(2) == 4", "assert f(math.pi) > 9")
)
RIGHT = "def f(x):\n    return x * x"


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        f"{RIGHT}\n[DONE]\nand more that is no code",
        f"Here you are:\n```python\n{RIGHT}\n```\nIt squares.",
        f"```\n{RIGHT}\n```\n```python\nraise ValueError\n```",
        f"```py\r\n{RIGHT}",
    ],
)
def test_the_program_is_cut_out(text: str) -> None:
    assert extract_code(text).strip() == RIGHT


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (f"```python\n{RIGHT}\n```", 1),
        ("def f(x):\n    return x + 2", 0),
        ("def f(x) return", 0),
        (f"{RIGHT}\nimport sys; sys.exit(0)", 0),
        (f"{RIGHT}\nimport os; os._exit(0)", 0),
        ("", 0),
    ],
)
def test_a_program_passes_where_all_asserts_hold(text: str, score: float) -> None:
    assert grade_by_execution(ITEM, text) == score


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(4 << 30)",
        "files = [open('/dev/null') for _ in range(100)]",
        "open('large', 'wb').write(bytes(64 << 20))",
        "input()",
        "import run_answer",  # what lies beside the runner
    ],
)
def test_what_goes_beyond_the_limits_fails(program: str) -> None:
    assert not passes(program)


def test_a_program_has_an_empty_folder_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hidden")
    monkeypatch.setenv("PYTHONPATH", "/")
    program = "import os; assert os.listdir() == [] and not {'SECRET_KEY', 'PYTHONPATH'} & set(os.environ)"
    assert passes(program)


def test_processes_end_with_their_program(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # As root there is no limit on processes; elsewhere the fork fails, and there is nothing to end.
    program = (
        f"import os, time\nopen({str(pids)!r}, 'w').write(str(os.getpid()))\n"
        f"child = os.fork()\nopen({str(pids)!r}, 'a').write(f' {{child}}' if child else '')\ntime.sleep(600)"
    )
    assert not passes(program, timeout_seconds=1)
    started = [int(pid) for pid in pids.read_text().split()]
    assert started
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in started)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
