"""How far benchmarks have come, on a terminal."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress

from megatron_vl.evaluate.suite import Task


class SuiteProgress:
    """A bar a benchmark while they run, on a terminal; elsewhere nothing. Use as a context manager."""

    def __init__(self, tasks: Sequence[Task], console: Console) -> None:
        columns = (
            "{task.description}",
            BarColumn(bar_width=16),
            "{task.completed:.0f}/{task.total:.0f} items",
        )
        shows = console.is_terminal and not console.quiet
        self._bars = Progress(*columns, console=console, transient=True, disable=not shows)
        self._waiting = [(self._bars.add_task(task.name, total=len(task.items)), task) for task in tasks]

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, done: int, total: int) -> None:
        """Of the present benchmark, by this rank's share of it."""
        bar, task = self._waiting[0]
        self._bars.update(bar, completed=len(task.items) * done / total)

    def end_benchmark(self) -> None:
        bar, task = self._waiting.pop(0)
        self._bars.update(bar, completed=len(task.items))
