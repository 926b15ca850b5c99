"""Who is silent or stands still, from what ranks tell of themselves now and then. Pure: time is given.

A rank is *silent* where nothing has come from it: its process is stopped, or its host is gone. All ranks *stand still*
where they are alive and none has left a mark on its trail: one of them is stuck, and the others wait for it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from megatron_vl.device.trail import Trail

LEFT = "left"  # the phase of a rank that has ended well
MAX_NAMED = 8  # ranks, in a message


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank tells of itself. `number` grows with every beat, `moves` with every mark on its trail."""

    host: str
    pid: int
    number: int
    moves: int
    phase: str
    waits: bool
    starting: bool
    place: str  # its last mark

    @classmethod
    def of(cls, trail: Trail, host: str, pid: int, number: int) -> Self:
        """A beat at the trail's last mark."""
        return cls(
            host=host,
            pid=pid,
            number=number,
            moves=trail.moves,
            phase=trail.phase,
            waits=trail.waits,
            starting=trail.starting,
            place=str(trail),
        )

    @classmethod
    def from_json(cls, text: bytes | str) -> Self:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))


@dataclass
class _Seen:
    beat: Beat
    heard_at: float
    moved_at: float


class Watch:
    """Judges the ranks that it hears of."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._seen: dict[int, _Seen] = {}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        """What a rank has told last; the same beat twice is no news."""
        seen = self._seen.get(rank)
        if seen is None:
            self._seen[rank] = _Seen(beat, now, now)
            return
        if beat.number != seen.beat.number:
            seen.heard_at = now
        if beat.moves != seen.beat.moves:
            seen.moved_at = now
        seen.beat = beat

    def forgive(self, now: float) -> None:
        """Begin to wait anew: the watch itself was stopped, so it cannot tell."""
        for seen in self._seen.values():
            seen.heard_at = seen.moved_at = now

    def silence(self, now: float) -> str | None:
        """Which ranks nothing is heard of, and where the others are; None where there are none."""
        here = self._here()
        silent = [rank for rank, seen in here.items() if now - seen.heard_at > self._hang_seconds]
        if not silent:
            return None
        seconds = max(now - here[rank].heard_at for rank in silent)
        return (
            f"nothing was heard for {seconds:.0f} s from {self._named(silent)}: stopped, or without its host or network"
            f"; there still: {self._named([rank for rank in here if rank not in silent])}"
        )

    def standstill(self, now: float) -> str | None:
        """Where all ranks are, if none has moved; None while one does, or is starting."""
        here = self._here()
        if not here or any(seen.beat.starting for seen in here.values()):
            return None
        seconds = min(now - seen.moved_at for seen in here.values())
        if seconds <= self._hang_seconds:
            return None
        by_progress = sorted(here, key=lambda rank: here[rank].beat.moves)
        at_work = [rank for rank in by_progress if not here[rank].beat.waits]
        waiting = [rank for rank in by_progress if here[rank].beat.waits]
        return (
            f"no rank has moved for {seconds:.0f} s. At work of their own, the least advanced first: "
            f"{self._named(at_work)}; waiting for others: {self._named(waiting)}"
        )

    def _here(self) -> dict[int, _Seen]:
        return {rank: seen for rank, seen in sorted(self._seen.items()) if seen.beat.phase != LEFT}

    def _named(self, ranks: Sequence[int]) -> str:
        beats = {rank: self._seen[rank].beat for rank in ranks[:MAX_NAMED]}
        names = [
            f"rank {rank} (process {beat.pid} on {beat.host}, last at {beat.place})"
            for rank, beat in beats.items()
        ]
        more = f" and {len(ranks) - MAX_NAMED} more ranks" if len(ranks) > MAX_NAMED else ""
        return (", ".join(names) or "nobody") + more
