"""What a run leaves for people to see: metrics, held-out losses, timelines, progress, tracker, report.

One rank records; on the others every method does nothing.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from megatron_vl.checkpoint.store import Saved
from megatron_vl.config.train import TrackingConfig
from megatron_vl.train.metrics import (
    BenchmarkScore,
    HeldoutLoss,
    ImageUse,
    JsonLines,
    StartupSeconds,
    StepMetrics,
)
from megatron_vl.train.progress import TrainingProgress
from megatron_vl.train.run_dir import RunDirectory, RunStatus
from megatron_vl.train.tracking import Trackers, open_trackers


class Recorder:
    """Writes the files of a run directory. Use as a context manager.

    `stages` are (name, number of steps), in order; `config` is the resolved configuration, for the tracker.
    """

    def __init__(
        self,
        run: RunDirectory,
        stages: list[tuple[str, int]],
        tracking: TrackingConfig,
        config: dict[str, Any],
        enabled: bool,
    ) -> None:
        self.run, self.enabled = run, enabled
        self._metrics, self._heldout = JsonLines(run.metrics), JsonLines(run.heldout)
        self._image_use, self._timeline = JsonLines(run.image_use), JsonLines(run.timeline)
        self._benchmarks, self._faults = JsonLines(run.benchmarks), JsonLines(run.faults)
        self._checkpoints, self._startup = JsonLines(run.checkpoint_costs), JsonLines(run.startup)
        self._files = (
            self._metrics,
            self._heldout,
            self._image_use,
            self._timeline,
            self._benchmarks,
            self._checkpoints,
            self._startup,
        )
        self._progress = TrainingProgress(stages, enabled=enabled and tracking.progress)
        self._tracking, self._config = tracking, config
        self._trackers: Trackers | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        if self.enabled:
            self._exits.callback(self._finish_trackers)
            for file in (*self._files, self._faults):
                self._exits.callback(file.close)
            self._exits.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def resume_after(self, global_step: int) -> None:
        """Forget what was recorded of later steps, which will be trained again, and open the trackers."""
        if self.enabled:
            for file in self._files:
                file.truncate_after(global_step)
            if self._trackers is None:
                self._trackers = open_trackers(
                    self._tracking, self.run, self._config, global_step + 1, self.say
                )

    def begin_stage(self, stage: str, done: int) -> None:
        if self.enabled:
            self.run.write_status(RunStatus("running", stage, done))
            self._progress.begin_stage(stage, done)

    def step(self, row: StepMetrics) -> None:
        if self.enabled:
            self._metrics.append(row)
            self._progress.update(row)
            self._track(asdict(row), row.global_step)

    def started(self, row: StartupSeconds) -> None:
        """A stage has done its first step."""
        if self.enabled:
            self._startup.append(row)
            self._track({"startup_seconds": row.seconds}, row.global_step)
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row.seconds.items())
            self.say(
                f"stage {row.stage} started in {sum(row.seconds.values()):.1f} s: {phases} (slowest ranks "
                f"{sum(row.slowest.values()):.1f})"
            )

    def measured(self, rows: Sequence[HeldoutLoss | ImageUse | BenchmarkScore]) -> None:
        if not self.enabled:
            return
        for row in rows:
            match row:
                case HeldoutLoss():
                    file, name, value = self._heldout, f"heldout/{row.source}", row.loss
                case ImageUse():
                    file, name, value = self._image_use, f"image_use/{row.source}", row.difference
                case BenchmarkScore():
                    file, name, value = self._benchmarks, f"{row.benchmark}/{row.metric}", row.value
            file.append(row)
            self._track({name: value}, row.global_step)

    def timeline(self, row: dict[str, Any]) -> None:
        if self.enabled:
            self._timeline.append(row)
            self._track({"bubble_fraction": row["bubble_fraction"]}, row["global_step"])

    def fault(self, row: Mapping[str, Any]) -> None:
        """Something went wrong: said, and kept for good, also of steps that are trained again. On disk at once."""
        if self.enabled:
            self._faults.append({"time": time.time(), **row})
            self._faults.sync()
            self.say(", ".join(f"{name} {value}" for name, value in row.items()))

    def saved(self, row: Saved) -> None:
        """A checkpoint is whole on disk."""
        if self.enabled:
            self._checkpoints.append(row)
            if row.notice:
                self.say(row.notice)

    def _track(self, row: Mapping[str, Any], global_step: int) -> None:
        if self._trackers is not None:
            self._trackers.log(row, global_step)

    def _finish_trackers(self) -> None:
        if self._trackers is not None:
            self._trackers.finish()

    def sync(self) -> None:
        """Bring all rows to disk: a checkpoint that relies on them follows."""
        for file in self._files:
            file.sync()

    def say(self, message: str) -> None:
        self._progress.say(message)

    def end(self, state: str, stage: str, step: int) -> None:
        """The run ends here, for now or for good: status and report."""
        if self.enabled:
            from megatron_vl.train.report import write_report  # matplotlib: on one rank, once

            self.run.write_status(RunStatus(state, stage, step))
            write_report(self.run)
