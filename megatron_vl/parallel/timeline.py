"""What each pipeline rank did when, recorded through the timer calls that megatron-core's schedules make."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

KINDS = {"forward-compute": "forward", "backward-compute": "backward"}


@dataclass(kw_only=True)
class Event:
    """One span of computation on this rank, in seconds since the recording began."""

    kind: str  # forward or backward
    start: float
    end: float = 0.0


@dataclass(kw_only=True)
class Timeline:
    """Takes the place of megatron-core's timers (`config.timers`) for one recorded step.

    `synchronize` drains the device, so that spans are real on CUDA: record single steps only.
    """

    synchronize: Callable[[], None]
    events: list[Event] = field(default_factory=list)
    began: float = field(default_factory=perf_counter)

    def __call__(self, name: str, log_level: int | None = None) -> "_Span":
        return _Span(self, KINDS.get(name))

    def now(self) -> float:
        self.synchronize()
        return perf_counter() - self.began


class _Span:
    """What a timer call returns; spans of other kinds than KINDS are not kept."""

    def __init__(self, timeline: Timeline, kind: str | None) -> None:
        self.timeline, self.kind = timeline, kind

    def start(self, **_barrier: Any) -> None:
        if self.kind is not None:
            self.timeline.events.append(Event(kind=self.kind, start=self.timeline.now()))

    def stop(self, **_barrier: Any) -> None:
        if self.kind is not None:
            self.timeline.events[-1].end = self.timeline.now()


def bubble_fraction(events_by_rank: list[list[Event]]) -> float:
    """Share of (ranks x the span from the first start to the last end) in which a rank computed nothing."""
    events = [event for rank in events_by_rank for event in rank]
    span = max(event.end for event in events) - min(event.start for event in events)
    busy = sum(event.end - event.start for event in events)
    return 1.0 - busy / (span * len(events_by_rank))
