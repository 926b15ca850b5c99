"""Metric rows keep every bit, survive crashes, and stand once after a resume."""

import json
import math
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vl.train.metrics import JsonLines, read_rows
from tests.support.metrics import ROW


def write(path: Path, steps: range, loss: float = 1.0) -> None:
    rows = JsonLines(path)
    for step in steps:
        rows.append(replace(ROW, step=step, global_step=step, loss=loss))
    rows.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(loss=st.floats())
def test_floats_keep_every_bit_and_the_file_is_standard_json(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    write(path, range(1, 2), loss)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    if math.isfinite(loss):
        assert row["loss"].hex() == loss.hex()
    else:
        assert row["loss"] is None
    assert row["grad_norm"].hex() == (1e-300).hex()


def test_a_row_is_on_its_way_before_append_returns(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "metrics.jsonl")
    rows.append(ROW)
    assert [row["loss"] for row in read_rows(rows.path)] == [0.1 + 0.2]


def test_after_a_resume_every_step_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    rows = JsonLines(path)
    rows.truncate_after(4)
    for step in range(5, 11):
        rows.append(replace(ROW, step=step, global_step=step))
    assert [row["global_step"] for row in read_rows(path)] == list(range(1, 11))


def test_truncation_also_applies_to_a_file_that_is_open(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        rows.append(replace(ROW, global_step=step))
    rows.truncate_after(2)
    rows.append(replace(ROW, global_step=3, loss=9.0))
    assert [(row["global_step"], row["loss"]) for row in read_rows(rows.path)][2:] == [(3, 9.0)]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in (1, last // 2, last - 1):
        path.write_bytes(whole[:-cut])
        rows = JsonLines(path)
        rows.truncate_after(3)
        rows.append(replace(ROW, step=3, global_step=3))
        assert [row["global_step"] for row in read_rows(path)] == [1, 2, 3]
        rows.close()


def test_a_row_after_a_torn_line_is_a_row(tmp_path: Path) -> None:
    """Of a file that is never cut back, such as faults.jsonl."""
    path = tmp_path / "faults.jsonl"
    path.write_text('{"kind": "skipped"}\n{"kind": "rol')
    JsonLines(path).append({"kind": "hang"})
    assert [row["kind"] for row in read_rows(path)] == ["skipped", "hang"]


def test_truncation_keeps_the_bytes_of_what_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), loss=0.1 + 0.2)
    lines = path.read_bytes().splitlines(keepends=True)
    JsonLines(path).truncate_after(2)
    assert path.read_bytes() == b"".join(lines[:2])


def test_nothing_to_truncate(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").truncate_after(0)
    assert not (tmp_path / "metrics.jsonl").exists()
