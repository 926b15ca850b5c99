"""A window of steps under torch's profiler, on the ranks that are asked for: a trace, and on CUDA a memory snapshot."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_vl.config.train import ProfileConfig
from megatron_vl.device.machine import Device

MAX_MEMORY_EVENTS = 1_000_000  # kept of allocations and frees


class ProfilerWindow:
    """Records from the begin of the window's first step, or where a run comes into it, to the end of its last one.

    Use as a context manager: a run that ends within the window leaves what there is. Steps are global ones. In
    `folder`, `rank-R-from-step-A.json.gz` is for Perfetto or chrome://tracing, `rank-R-from-step-A.pickle` for
    pytorch.org/memory_viz. What goes wrong with a profile is said, and training goes on.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, rank: int, device: Device, say: Callable[[str], None]
    ) -> None:
        is_wanted = bool(config.steps) and rank in config.ranks
        self._window = range(config.steps[0], config.steps[1] + 1) if is_wanted else range(0)
        self._folder, self._rank, self._device, self._say = folder, rank, device, say
        self._running: tuple[profile, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def before(self, global_step: int) -> None:
        """The step is about to begin."""
        if global_step in self._window and self._running is None:
            activities = [ProfilerActivity.CPU]
            if self._device.kind == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            running = profile(activities=activities, record_shapes=True)
            running.start()
            self._running = running, f"rank-{self._rank}-from-step-{global_step}"

    def after(self, global_step: int) -> None:
        """The step has ended."""
        if self._window and global_step >= self._window[-1]:
            self._finish()

    def _finish(self) -> None:
        if self._running is None:
            return
        (running, name), self._running = self._running, None
        self._device.synchronize()
        running.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if self._device.kind == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            self._say(f"tracking.profile: {error}; nothing of {name} is kept")
        else:
            self._say(f"profile: {self._folder / name}.json.gz")
