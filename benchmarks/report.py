"""What a benchmark prints: a table for people and, as its last line, one JSON object for programs."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_vl.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What was measured of us and of a peer or a limit, in `unit`, and the `goal` that their `ratio` has to meet."""

    name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    bound: Literal["at least", "at most"]
    goal: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal if self.bound == "at least" else self.ratio <= self.goal


def table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Aligned columns; numbers with 3 digits behind the point, at the right."""
    cells = [list(header), *([f"{x:.3f}" if isinstance(x, float) else x for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def last_line(name: str, goals: Sequence[Goal]) -> str:
    """The first goal's figures, `met` only if every goal is, and all goals."""
    first = goals[0]
    summary = {
        "name": name,
        "ours": first.ours,
        "peer": first.peer,
        "ratio": first.ratio,
        "goal": first.goal,
        "met": all(goal.met for goal in goals),
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }
    return json.dumps(summary)


def print_goals(name: str, goals: Sequence[Goal]) -> None:
    """The end of a benchmark: its goals in words, then the JSON line."""
    rows: list[list[str | float]] = [
        [
            goal.name,
            goal.ours,
            goal.peer,
            goal.unit,
            goal.ratio,
            f"{goal.bound} {goal.goal:g}",
            _yes(goal.met),
        ]
        for goal in goals
    ]
    print(table(["goal", "ours", "peer", "unit", "ratio", "must be", "met"], rows), end="\n\n")
    print(last_line(name, goals), flush=True)


def run_benchmark(main: Callable[[], None]) -> None:
    """Call `main`; a UserError is printed alone, and the exit status is then 1."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _yes(met: bool) -> str:
    return "yes" if met else "NO"
