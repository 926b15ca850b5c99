"""Counts of a whole source from its index, shard by shard: what is held grows with how much values differ, not with
how many there are. N samples, I images of a shard, D different values."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex


class Bar(NamedTuple):
    """How many of the values lie in `first` to `last`, both included."""

    first: int
    last: int
    num: int


@dataclass
class Tally:
    """How often each whole number came: `values` int64 [D], rising, and `counts` int64 [D]."""

    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, numbers: NDArray[Any]) -> None:
        """Count more numbers, [N] of any integer type."""
        values, counts = np.unique(numbers.astype(np.int64), return_counts=True)
        self.values, places = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.zeros(len(self.values), dtype=np.int64)
        np.add.at(total, places, np.concatenate([self.counts, counts]))
        self.counts = total

    @property
    def number(self) -> int:
        """How many numbers were counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int((self.values * self.counts).sum())

    @property
    def mean(self) -> float:
        return self.total / max(self.number, 1)

    def quantile(self, share: float) -> int:
        """The least value that at least this share of the numbers does not exceed; 0 where there are none."""
        if not len(self.values):
            return 0
        place = np.searchsorted(np.cumsum(self.counts), share * self.number)
        return int(self.values[min(int(place), len(self.values) - 1)])

    def bars(self, most: int = 40) -> list[Bar]:
        """At most so many ranges that hold all values, without gaps; each a like part longer than the one before where
        the values differ by more than a factor of 50, else all of a length."""
        if not len(self.values):
            return []
        low, high = int(self.values[0]), int(self.values[-1])
        edges = np.linspace(low, high + 1, most + 1)
        if high > 50 * max(low, 1):
            edges = np.concatenate([[low], np.geomspace(max(low, 1), high + 1, most + 1)[1:]])
        firsts = np.unique(np.ceil(edges[:-1]).astype(np.int64).clip(max=high))
        places = np.searchsorted(self.values, firsts)
        before = np.append(0, np.cumsum(self.counts))
        counts = np.diff(np.append(before[places], before[-1]))
        lasts = np.append(firsts[1:] - 1, high)
        return [Bar(*each) for each in zip(firsts.tolist(), lasts.tolist(), counts.tolist(), strict=True)]


@dataclass(kw_only=True)
class SourceCounts:
    """One folder of shards in numbers. Text tokens count ends of sentence; `positions` count image tokens too."""

    index: SourceIndex
    text_tokens: Tally = field(default_factory=Tally)  # of each sample
    positions: Tally = field(default_factory=Tally)  # that each sample takes in a row, image tokens included
    images: Tally = field(default_factory=Tally)  # of each sample
    long_sides: Tally = field(default_factory=Tally)  # pixels, of each readable image
    num_unreadable: int = 0


def count_source(index: SourceIndex, shards: Iterable[int], tokens: ImageTokens) -> SourceCounts:
    """Read the columns of these shards, one after the other.

    Raises UserError where a shard's columns cannot be read.
    """
    counts = SourceCounts(index=index)
    for number in shards:
        columns = index.columns(number)
        index.columns.cache_clear()  # nobody will ask for them again
        counts.text_tokens.add(columns.num_text_tokens)
        counts.positions.add(columns.num_positions(tokens))
        counts.images.add(columns.num_images)
        sides = columns.image_sizes.max(axis=1, initial=0)
        counts.long_sides.add(sides[sides > 0])
        counts.num_unreadable += int((sides == 0).sum())
    return counts
