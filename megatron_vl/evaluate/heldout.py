"""Held-out loss per sample, at any parallel setting, with the right images or with other samples' images."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
from torch import Tensor

from megatron_vl.data.index import Location, SourceIndex
from megatron_vl.data.types import Unit
from megatron_vl.data.units import IndexedUnits
from megatron_vl.evaluate.rows import RowScorer


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Per sample of one source, in order: summed loss and supervised tokens. The same on all ranks."""

    loss_sums: Tensor  # fp64 [samples]
    num_tokens: Tensor  # fp64 [samples]

    @property
    def loss(self) -> float:
        """Per supervised token, over all samples."""
        return float(self.loss_sums.sum() / self.num_tokens.sum())

    @property
    def sample_losses(self) -> list[float]:
        """Mean loss of each sample; samples without supervision are left out."""
        kept = self.num_tokens > 0
        means: list[float] = (self.loss_sums[kept] / self.num_tokens[kept]).tolist()
        return means


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of wrong - right over pairs, with its 95 % interval (normal approximation)."""

    right: float
    wrong: float
    difference: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores sources with a model. Its calls are collective over the world."""

    rows: RowScorer
    max_samples: int  # per source

    def score(self, index: SourceIndex) -> SampleScores:
        """Score the first `max_samples` samples that fit a row."""
        rows = self.rows
        reader = IndexedUnits({index.name: index}, rows.content, rows.sequence_length, rows.role)
        scores = rows.score(self._units(index), reader)
        return SampleScores(loss_sums=scores.loss_sums, num_tokens=scores.num_tokens)

    def image_use(self, index: SourceIndex, right: SampleScores) -> PairedDifference:
        """Score again, each sample with the images of another one, and compare with `right`, pair by pair."""
        wrong = self.score(SwappedImages(index))
        pairs = list(zip(right.sample_losses, wrong.sample_losses, strict=True))
        differences = [bad - good for good, bad in pairs]
        mean = fmean(differences)
        margin = 1.96 * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
        return PairedDifference(
            right=fmean(right.sample_losses),
            wrong=fmean(wrong.sample_losses),
            difference=mean,
            low=mean - margin,
            high=mean + margin,
            num_samples=len(differences),
        )

    def _units(self, index: SourceIndex) -> list[Unit]:
        lengths = index.num_positions(self.rows.content.image_tokens)
        fitting = np.flatnonzero(lengths <= self.rows.sequence_length)[: self.max_samples]
        return [
            Unit(
                source=index.name,
                sample=int(row),
                piece=0,
                num_tokens=int(lengths[row]),
                num_images=int(index.num_images[row]),
            )
            for row in fitting
        ]


class SwappedImages(SourceIndex):
    """An index whose samples hold the images of the next sample of their shard that has as many."""

    def __init__(self, index: SourceIndex) -> None:
        vars(self).update(vars(index))
        bounds = [*index.shard_starts, index.num_samples]
        self._partners = np.arange(index.num_samples)
        for start, stop in pairwise(bounds):
            for count in np.unique(index.num_images[start:stop]):
                rows = start + np.flatnonzero(index.num_images[start:stop] == count)
                self._partners[rows] = np.roll(rows, -1)

    def locate(self, row: int) -> Location:
        """The text of one sample, the images of its partner."""
        return replace(super().locate(row), images=super().locate(int(self._partners[row])).images)
