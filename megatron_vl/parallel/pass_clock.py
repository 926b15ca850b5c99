"""Every step's passes, marked and timed through the timer calls that megatron-core's schedules make."""

from collections import Counter
from time import perf_counter
from typing import Any

import torch

from megatron_vl.device.trail import TRAIL
from megatron_vl.parallel.timeline import KINDS, Timeline


class PassClock:
    """Takes the place of megatron-core's timers (`config.timers`) for good.

    Leaves a mark on the trail at each pass and each exchange between ranks, and adds up what this rank's passes take,
    without waiting for the device. A `timeline` hears of all calls too, while one is set.
    """

    def __init__(self, device: torch.device) -> None:
        self.timeline: Timeline | None = None
        self._on_cuda = device.type == "cuda"
        self._spans: dict[str, _Span] = {}
        self._counts: Counter[str] = Counter()
        self._times: list[tuple[Any, Any]] = []
        self.last_step = 0.0  # seconds of its passes

    def __call__(self, name: str, log_level: int | None = None) -> "_Span":
        if name not in self._spans:
            self._spans[name] = _Span(self, name)
        return self._spans[name]

    def begin_step(self) -> None:
        """Passes are counted, and their times added up, from here."""
        self._counts.clear()
        self._times.clear()

    def end_step(self) -> None:
        """Sets `last_step` to what this step's passes took, without what ranks wait for between them. The device must
        have finished them."""
        if self._on_cuda:
            self.last_step = float(sum(start.elapsed_time(end) for start, end in self._times)) / 1000
        else:
            self.last_step = float(sum(end - start for start, end in self._times))

    def count(self, kind: str) -> int:
        """The number of the pass that begins."""
        self._counts[kind] += 1
        return self._counts[kind]

    def now(self) -> Any:
        """A moment, in the order of the device's work."""
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, end: Any) -> None:
        """A pass has run between two moments."""
        self._times.append((start, end))


class _Span:
    """What a timer call returns: a pass of KINDS, or something that ranks do together."""

    def __init__(self, clock: PassClock, name: str) -> None:
        self._clock, self._name, self._kind = clock, name, KINDS.get(name)
        self._number, self._began = 0, None

    def start(self, **_barrier: Any) -> None:
        clock = self._clock
        if self._kind is None:
            TRAIL.at(self._name, waits=True)
        else:
            self._number = clock.count(self._kind)
            TRAIL.at(self._kind, self._number)
            self._began = clock.now()
        if clock.timeline is not None:
            clock.timeline(self._name).start()

    def stop(self, **_barrier: Any) -> None:
        clock = self._clock
        if clock.timeline is not None:
            clock.timeline(self._name).stop()
        if self._kind is not None:
            clock.add(self._began, clock.now())
        TRAIL.at(f"after {self._kind or self._name}", self._number, waits=True)
