"""What a person watching the run sees: one bar a stage on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from megatron_vl.train.metrics import StepMetrics

LINE_SECONDS = 10.0
SMOOTHING = 0.9  # of the tokens per second shown
WIDE = 100  # columns from which both modalities' losses fit


class TrainingProgress:
    """Shows stage, step, modality, loss, tokens per second and the time left of the stage.

    `stages` are (name, number of steps), in order. Use as a context manager; ranks that stay silent pass
    enabled=False. Call `begin_stage` at each stage (when resumed: its own first), `update` after each step.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, int]],
        enabled: bool = True,
        console: Console | None = None,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._console = console or Console(quiet=not enabled)
        self._steps = dict(stages)
        self._line_seconds = line_seconds
        self._last_line = float("-inf")
        self._began, self._done_before = time.monotonic(), 0
        self._losses: dict[str, float] = {}
        self._tokens_per_second: float | None = None
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if enabled and self._console.is_terminal:
            self._bars = _bars(self._console)
            for name, steps in stages:
                self._tasks[name] = self._bars.add_task(name, total=steps, facts="")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin_stage(self, name: str, done: int = 0) -> None:
        """The stage starts, or goes on after `done` of its steps."""
        self._losses.clear()
        self._began, self._done_before = time.monotonic(), done
        if self._bars is not None:
            self._bars.reset(self._tasks[name], completed=done)
        else:
            self.say(f"stage {name}: {self._steps[name]} steps" + (f", {done} of them done" if done else ""))

    def update(self, row: StepMetrics) -> None:
        """A step is done."""
        self._losses[row.modality] = row.loss
        now, before = row.tokens_per_second, self._tokens_per_second
        self._tokens_per_second = now if before is None else SMOOTHING * before + (1 - SMOOTHING) * now
        if self._bars is not None:
            self._bars.update(self._tasks[row.stage], completed=row.step, facts=self._facts(row.modality))
        elif time.monotonic() - self._last_line >= self._line_seconds or row.step == self._steps[row.stage]:
            self._last_line = time.monotonic()
            self.say(self._line(row))

    def say(self, message: str) -> None:
        """A line of its own: a checkpoint, a held-out loss."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _facts(self, modality: str) -> str:
        names = [modality] + [
            name for name in self._losses if name != modality and self._console.width >= WIDE
        ]
        losses = " · ".join(f"{name} loss {self._losses[name]:.3f}" for name in names)
        return f"{losses} · {self._tokens_per_second:,.0f} tokens/s"

    def _line(self, row: StepMetrics) -> str:
        total = self._steps[row.stage]
        seconds_per_step = (time.monotonic() - self._began) / (row.step - self._done_before)
        left = timedelta(seconds=round(seconds_per_step * (total - row.step)))
        return (
            f"{row.stage} {row.step}/{total} · {row.modality} loss {row.loss:.4f} · "
            f"{self._tokens_per_second:,.0f} tokens/s · {left} left"
        )


class _TimeColumn(ProgressColumn):
    """The time a stage took, or has left."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {timedelta(seconds=round(task.finished_time or 0))}", style="green")
        seconds = task.time_remaining
        return Text("" if seconds is None else f"{timedelta(seconds=round(seconds))} left", style="cyan")


def _bars(console: Console) -> Progress:
    columns = ("{task.description}", BarColumn(bar_width=16), "{task.completed:.0f}/{task.total:.0f}")
    facts = "{task.fields[facts]}"
    return Progress(
        *columns, _TimeColumn(), facts, console=console, refresh_per_second=4, speed_estimate_period=60
    )
