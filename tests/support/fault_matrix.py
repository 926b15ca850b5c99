"""The table of docs/reliability.md: tests hold it to what they see, or, asked to, write that into it.

`WRITE_FAULT_MATRIX=1 pytest -m "slow or not slow" tests/acceptance/test_14_*.py` writes the cells of every row whose
test ran, one process at a time.
"""

import os
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BIT_FOR_BIT, WITHIN, NO_RESULT = "bit for bit", "within 1e-5", "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a fault: seconds until the run had ended or gone on (the most that was seen), optimizer steps that
    were trained again or left out, and how the losses compare with the uninterrupted run's."""

    fault: str
    detected_seconds: float | None
    steps_lost: int
    result: str


def seen(row: Row) -> None:
    """Raises AssertionError where the page gives another result. Seconds and steps are those of the machine that wrote
    them: how far training is when a checkpoint is whole depends on the disk."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    number = next((n for n, line in enumerate(lines) if line.startswith(f"| {row.fault} |")), None)
    assert number is not None, f"{PAGE} has no row for {row.fault!r}"
    cells = [cell.strip() for cell in lines[number].strip().strip("|").split("|")]
    if os.environ.get("WRITE_FAULT_MATRIX"):
        seconds = "–" if row.detected_seconds is None else f"{row.detected_seconds:.1f} s"
        cells[1:4] = [seconds, str(row.steps_lost), row.result]
        lines[number] = f"| {' | '.join(cells)} |\n"
        PAGE.write_text("".join(lines), encoding="utf-8")
        return
    assert cells[3] == row.result, f"{row.fault}: {row.result}, but {PAGE} says {cells[3]}"
