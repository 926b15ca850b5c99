"""Which split of the decoder's layers over pipeline chunks makes a stage's steps fastest.

One split serves text-only and multimodal steps. The classic answer, the split whose busiest rank is least busy, is
found exactly; but ranks also wait for each other, so the simulator has the last word: over all splits where these are
few, else over those within two moved layers of the best so far, from the classic answer and from an even split.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_vl.planning.simulate import Array

Split = NDArray[np.int64]  # [num_chunks, B]
Counts = tuple[int, ...]  # layers of each chunk
NEAREST = 8  # neighbours whose neighbours are looked at too
EXHAUSTIVE = 600  # splits: all are simulated
AT_ONCE = 2048  # cases of one simulation


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What layers are divided over. Chunks between the first and the last hold at least one; those two may hold none,
    as they have stage zero and the head."""

    num_layers: int
    pipeline_size: int
    virtual_size: int = 1

    @property
    def num_chunks(self) -> int:
        return self.pipeline_size * self.virtual_size

    @property
    def least(self) -> Counts:
        """Layers that a chunk must hold."""
        inner = self.num_chunks - 2
        return (0, *[1] * inner, 0) if inner >= 0 else (self.num_layers,)

    @property
    def num_splits(self) -> int:
        free = self.num_layers - sum(self.least)
        return math.comb(free + self.num_chunks - 1, free) if free >= 0 else 0

    def all_splits(self) -> Iterator[Counts]:
        """Every way to place the layers, by where the chunks' borders fall."""
        free = self.num_layers - sum(self.least)
        places = free + self.num_chunks - 1
        for borders in combinations(range(places), self.num_chunks - 1):
            ends = (-1, *borders, places)
            yield tuple(
                low + after - before - 1
                for low, before, after in zip(self.least, ends[:-1], ends[1:], strict=True)
            )


@dataclass(frozen=True, kw_only=True)
class RankCosts:
    """One kind of step. Seconds of a rank: what it takes without layers, and for each of its layers."""

    share: float  # of the stage's steps
    base: tuple[float, ...]
    layer: float


@dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    counts: Counts
    seconds: float

    @property
    def layout(self) -> str:
        """megatron-core's string."""
        return layout_of(self.counts)


def layout_of(counts: Counts) -> str:
    return "E" + "|".join("t" * count for count in counts) + "L"


def min_max(costs: list[RankCosts], num_layers: int, least: Counts, most: Counts) -> Counts | None:
    """Layers of each rank, between `least` and `most`, for which the sum over kinds of share x the busiest rank's
    seconds is the smallest; None where the layers have no place.

    Exact: for one kind of step a threshold is searched; of two, the first one's threshold takes each of its possible
    values.
    """
    limits = np.array(most)
    if limits.sum() < num_layers or sum(least) > num_layers or (limits < least).any():
        return None
    first, *others = costs
    best = (math.inf, limits)
    for threshold in _thresholds(first, num_layers):
        under = np.minimum(limits, _room(first, threshold))
        if under.sum() < num_layers or (under < least).any():
            continue
        total = first.share * threshold
        if others:
            last, under = _lowest(others[0], num_layers, least, under)
            total += others[0].share * last
        if total < best[0]:
            best = (total, under)
        if not others:
            break  # thresholds rise
    return level(costs, num_layers, least, tuple(best[1].tolist()))


def _thresholds(costs: RankCosts, num_layers: int) -> list[float]:
    """What the busiest rank's seconds can be, rising."""
    values = {base + costs.layer * count for base in costs.base for count in range(num_layers + 1)}
    lowest = max(costs.base)
    return sorted(value for value in values if value >= lowest)


def _room(costs: RankCosts, threshold: float) -> NDArray[np.int64]:
    """How many layers each rank can hold without passing `threshold`."""
    room = (threshold - np.array(costs.base)) / costs.layer
    floor: NDArray[np.int64] = np.floor(room + 1e-9).astype(np.int64)
    return floor


def _lowest(
    costs: RankCosts, num_layers: int, least: Counts, limits: NDArray[np.int64]
) -> tuple[float, NDArray[np.int64]]:
    """The lowest threshold that leaves room for all layers within `limits`, and that room."""
    thresholds = _thresholds(costs, num_layers)
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        under = np.minimum(limits, _room(costs, thresholds[middle]))
        if under.sum() >= num_layers and (under >= least).all():
            high = middle
        else:
            low = middle + 1
    return thresholds[low], np.minimum(limits, _room(costs, thresholds[low]))


def level(costs: list[RankCosts], num_layers: int, least: Counts, most: Counts) -> Counts | None:
    """Layers of each rank, between `least` and `most`, one by one to the rank that is least busy on average; None where
    they have no place."""
    counts, limits = np.array(least), np.array(most)
    if limits.sum() < num_layers or counts.sum() > num_layers or (limits < counts).any():
        return None
    base = np.sum([kind.share * np.array(kind.base) for kind in costs], axis=0)
    layer = sum(kind.share * kind.layer for kind in costs)
    for _ in range(num_layers - counts.sum()):
        busy = np.where(counts < limits, base + layer * counts, math.inf)
        counts[int(busy.argmin())] += 1
    return tuple(counts.tolist())


def spread_over_chunks(by_rank: Counts, pipeline: Pipeline, extra: tuple[float, float]) -> Counts:
    """Each rank's layers over its chunks, so that chunks are alike. `extra`: what stage zero and the head are worth in
    layers."""
    worth = np.zeros(pipeline.num_chunks)
    worth[0] += extra[0]
    worth[-1] += extra[1]
    counts = np.array(pipeline.least)
    for rank, total in enumerate(by_rank):
        mine = np.arange(rank, pipeline.num_chunks, pipeline.pipeline_size)
        for _ in range(total - counts[mine].sum()):
            counts[mine[int((worth + counts)[mine].argmin())]] += 1
    return tuple(counts.tolist())


def best_splits(
    pipeline: Pipeline,
    seconds: Callable[[Split], Array],
    starts: list[Counts],
    most: Counts | None = None,
    exhaustive: int = EXHAUSTIVE,
) -> list[ScoredSplit]:
    """Splits by the mean seconds of their steps, the best first: all that were looked at.

    `most` are the layers that memory lets each rank hold; `starts`, where the search begins, are within that.
    """
    search = _Search(pipeline, seconds, most)
    if pipeline.num_splits <= exhaustive:
        search.look(list(pipeline.all_splits()))
    else:
        for start in starts:
            search.descend(start)
    ranked = sorted(search.found.items(), key=lambda item: (item[1], item[0]))
    return [ScoredSplit(counts=counts, seconds=value) for counts, value in ranked]


class _Search:
    """Splits that have been simulated."""

    def __init__(self, pipeline: Pipeline, seconds: Callable[[Split], Array], most: Counts | None) -> None:
        self.pipeline, self.seconds = pipeline, seconds
        self.most = most or (pipeline.num_layers,) * pipeline.pipeline_size
        self.found: dict[Counts, float] = {}

    def descend(self, start: Counts) -> None:
        """Go to the best neighbour while there is a better one; look two moves far before giving up."""
        self.look([start])
        here = start
        while True:
            near = self._neighbours([here])
            better = self._best(near)
            if better is None or self.found[better] >= self._at(here):
                nearest = sorted(self.found.keys() & set(near), key=self.found.__getitem__)[:NEAREST]
                better = self._best(self._neighbours(nearest))
            if better is None or self.found[better] >= self._at(here):
                return
            here = better

    def look(self, splits: list[Counts]) -> None:
        """Simulate those that are allowed and have not been."""
        new = [split for split in dict.fromkeys(splits) if split not in self.found and self._allowed(split)]
        for first in range(0, len(new), AT_ONCE):
            batch = new[first : first + AT_ONCE]
            values = self.seconds(np.array(batch, dtype=np.int64).T)
            self.found |= dict(zip(batch, values.tolist(), strict=True))

    def _best(self, splits: list[Counts]) -> Counts | None:
        self.look(splits)
        return min((one for one in splits if one in self.found), key=self.found.__getitem__, default=None)

    def _at(self, split: Counts) -> float:
        return self.found.get(split, math.inf)

    def _neighbours(self, splits: list[Counts]) -> list[Counts]:
        """One layer moved from one chunk to another."""
        chunks = range(self.pipeline.num_chunks)
        return [
            tuple(count + (chunk == to) - (chunk == fro) for chunk, count in enumerate(split))
            for split in splits
            for fro in chunks
            for to in chunks
            if fro != to and split[fro] > self.pipeline.least[fro]
        ]

    def _allowed(self, split: Counts) -> bool:
        size = self.pipeline.pipeline_size
        return all(sum(split[rank::size]) <= most for rank, most in enumerate(self.most))
