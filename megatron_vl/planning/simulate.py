"""When each pass of a pipeline schedule runs: the schedule's own order, with the seconds that passes take.

A schedule is solved once into a graph, whose nodes are passes and messages: a pass starts when its rank is free and
its input has arrived; a message travels when both sides have offered it. Times are then sums and maxima along that
graph, for many cases at once (splits of the layers, replicas of a step): arrays end in one axis for cases, B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_vl.planning.schedule import Pass, Post, Program, Schedule, Wait

Array = NDArray[np.float64]
KINDS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a rank did from `start` to `end`, in seconds since the step began."""

    kind: str  # forward, backward or vision
    start: float
    end: float
    microbatch: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A schedule with times. `starts` and `ends`: [2, num_chunks, num_microbatches, B], forward first."""

    schedule: Schedule
    starts: Array
    ends: Array

    @cached_property
    def rank_ends(self) -> Array:
        """When each rank's last pass ends: [pipeline_size, B]."""
        return np.stack([self._of_rank(self.ends, rank).max((0, 1, 2)) for rank in self._ranks])

    @cached_property
    def seconds(self) -> Array:
        """From the first pass to the last: [B]."""
        longest: Array = self.rank_ends.max(0)
        return longest

    @cached_property
    def busy(self) -> Array:
        """Seconds in which each rank computes: [pipeline_size, B]."""
        durations = self.ends - self.starts
        return np.stack([self._of_rank(durations, rank).sum((0, 1, 2)) for rank in self._ranks])

    @property
    def bubble_fraction(self) -> Array:
        """Share of ranks x seconds in which a rank computes nothing: [B]."""
        fraction: Array = 1.0 - self.busy.sum(0) / (self.seconds * self.schedule.pipeline_size)
        return fraction

    def spans(self, case: int = 0) -> list[list[Span]]:
        """One case's passes, per rank in order."""
        return [
            [
                Span(
                    kind=each.kind,
                    start=float(self.starts[_place(each)][case]),
                    end=float(self.ends[_place(each)][case]),
                    microbatch=each.microbatch,
                    chunk=each.chunk,
                )
                for each in self.schedule.passes(rank)
            ]
            for rank in self._ranks
        ]

    @property
    def _ranks(self) -> range:
        return range(self.schedule.pipeline_size)

    def _of_rank(self, values: Array, rank: int) -> Array:
        return values[:, rank :: self.schedule.pipeline_size]


def replay(
    schedule: Schedule, seconds: Array, message_seconds: float = 0.0, ready: Array | float = 0.0
) -> Replay:
    """Run `schedule` with passes of `seconds` [2, num_chunks, num_microbatches, B], forward first.

    `message_seconds`: from both sides' readiness to a message's arrival. `ready` [num_chunks, B]: before when a chunk's
    first forward pass cannot start, since its parameters are still being gathered.
    """
    shape = (2, schedule.num_chunks, schedule.num_microbatches)
    if seconds.shape[:-1] != shape:
        raise ValueError(f"passes' seconds are {seconds.shape}; this schedule has {shape} passes, and cases")
    graph = _graph(schedule)
    num_passes = graph.num_passes
    durations = np.full((graph.num_nodes, seconds.shape[-1]), float(message_seconds))
    durations[:num_passes] = seconds.reshape(num_passes, -1)
    starts = np.zeros_like(durations)
    ends = np.zeros_like(durations)
    ends[2 * num_passes : -1] = ready
    for nodes, earlier in graph.levels:
        starts[nodes] = ends[earlier].max(axis=1)
        ends[nodes] = starts[nodes] + durations[nodes]
    return Replay(
        schedule=schedule,
        starts=starts[:num_passes].reshape(seconds.shape),
        ends=ends[:num_passes].reshape(seconds.shape),
    )


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """Nodes: passes, in the order of a [kind, chunk, microbatch] array; messages likewise; each chunk's readiness; last
    the beginning.

    A level's nodes [n] depend on nodes of earlier levels only, [n, most]; short rows repeat their first entry.
    """

    num_passes: int
    num_nodes: int
    levels: list[tuple[NDArray[np.intp], NDArray[np.intp]]]


@lru_cache(maxsize=128)
def _graph(schedule: Schedule) -> _Graph:
    num_passes = 2 * schedule.num_chunks * schedule.num_microbatches
    num_nodes = 2 * num_passes + schedule.num_chunks + 1
    earlier = _Solver(schedule).solve()
    for chunk in range(schedule.num_chunks):
        earlier[chunk * schedule.num_microbatches] |= {2 * num_passes + chunk}
    level: dict[int, int] = dict.fromkeys(range(2 * num_passes, num_nodes), 0)
    by_level: list[list[int]] = []
    for node, before in earlier.items():  # what a node needs precedes it
        level[node] = 1 + max(level[one] for one in before)
        by_level += [[] for _ in range(level[node] - len(by_level))]
        by_level[level[node] - 1].append(node)
    return _Graph(
        num_passes=num_passes,
        num_nodes=num_nodes,
        levels=[(np.array(nodes), _padded([earlier[node] for node in nodes])) for nodes in by_level],
    )


def _padded(rows: list[frozenset[int]]) -> NDArray[np.intp]:
    most = max(len(row) for row in rows)
    lists = [sorted(row) for row in rows]
    return np.array([row + row[:1] * (most - len(row)) for row in lists])


class _Solver:
    """Steps every rank through its program until all have ended, noting what each pass and message waits for."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.num_passes = 2 * schedule.num_chunks * schedule.num_microbatches
        self.earlier: dict[int, frozenset[int]] = {}
        beginning = 2 * self.num_passes + schedule.num_chunks
        self.done = [frozenset({beginning})] * schedule.pipeline_size  # what each rank has waited for
        self.offered: dict[int, frozenset[int]] = {}  # by one side: when

    def solve(self) -> dict[int, frozenset[int]]:
        """What each node waits for; a node comes after all that it waits for."""
        programs = [self.schedule.program(rank) for rank in range(self.schedule.pipeline_size)]
        places = [0] * len(programs)
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(programs):
                before = places[rank]
                places[rank] = self._advance(rank, program, before)
                moved |= places[rank] > before
        stuck = {
            rank: program[place]
            for rank, (program, place) in enumerate(zip(programs, places, strict=True))
            if place < len(program)
        }
        if stuck:
            raise RuntimeError(f"{self.schedule} is stuck: ranks wait for {stuck}")
        return self.earlier

    def _advance(self, rank: int, program: Program, place: int) -> int:
        """Run `rank` until it waits for what has not been offered by both sides; its place then."""
        for action in program[place:]:
            if isinstance(action, Post):
                for message in action.messages:
                    self._offer(rank, self.num_passes + self._node(message))
            else:
                awaited = action.messages if isinstance(action, Wait) else self.schedule.message_to(action)
                nodes = [self.num_passes + self._node(message) for message in awaited]
                if not all(node in self.earlier for node in nodes):
                    return place
                self.done[rank] |= frozenset(nodes)
                if isinstance(action, Pass):
                    node = self._node(action)
                    self.earlier[node] = self.done[rank]
                    self.done[rank] = frozenset({node})
            place += 1
        return place

    def _offer(self, rank: int, message: int) -> None:
        if message in self.offered:
            self.earlier[message] = self.offered.pop(message) | self.done[rank]
        else:
            self.offered[message] = self.done[rank]

    def _node(self, one: Pass) -> int:
        kind, chunk, microbatch = _place(one)
        return (kind * self.schedule.num_chunks + chunk) * self.schedule.num_microbatches + microbatch


def _place(one: Pass) -> tuple[int, int, int]:
    return KINDS.index(one.kind), one.chunk, one.microbatch


def case_of(forward: Sequence[float], backward: Sequence[float], num_microbatches: int) -> Array:
    """Seconds of one case in which every microbatch costs the same: per chunk, forward and backward."""
    per_chunk = np.array([forward, backward], dtype=np.float64)
    return np.repeat(per_chunk[:, :, None, None], num_microbatches, axis=2)
