"""Held-out loss per sample, at any parallel setting, with the right images or with other samples' images."""

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
from torch import Tensor

from megatron_vl.data.index import SourceIndex
from megatron_vl.data.shard_index import Location
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

    def image_use(self, index: SourceIndex, right: SampleScores) -> PairedDifference | None:
        """Score again, each sample with the images of another one, and compare with `right`, pair by pair. None where
        no sample has a loss with both: an image may not decode."""
        return paired_difference(right, self.score(SwappedImages(index)))

    def _units(self, index: SourceIndex) -> list[Unit]:
        units: list[Unit] = []
        for number, first in enumerate(index.first_samples.tolist()):
            columns = index.columns(number)
            lengths = columns.num_positions(self.rows.content.image_tokens)
            for sample in np.flatnonzero(lengths <= self.rows.sequence_length).tolist():
                if len(units) == self.max_samples:
                    return units
                length, num_images = int(lengths[sample]), int(columns.num_images[sample])
                units.append(Unit(index.name, first + sample, 0, length, num_images))
        return units


def paired_difference(right: SampleScores, wrong: SampleScores) -> PairedDifference | None:
    """Over the samples that have a loss in both; None without any."""
    kept = (right.num_tokens > 0) & (wrong.num_tokens > 0)
    good, bad = ((one.loss_sums[kept] / one.num_tokens[kept]).tolist() for one in (right, wrong))
    if not good:
        return None
    differences = [worse - better for better, worse in zip(good, bad, strict=True)]
    mean = fmean(differences)
    margin = 1.96 * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
    return PairedDifference(
        right=fmean(good),
        wrong=fmean(bad),
        difference=mean,
        low=mean - margin,
        high=mean + margin,
        num_samples=len(differences),
    )


class SwappedImages(SourceIndex):
    """An index whose samples hold the images of the next sample of their shard that has as many."""

    def __init__(self, index: SourceIndex) -> None:
        vars(self).update(vars(index))

    def locate(self, row: int) -> Location:
        """The text of one sample, the images of its partner."""
        number = self.shard_of(row)
        first, num_images = int(self.first_samples[number]), self.columns(number).num_images
        alike = first + np.flatnonzero(num_images == num_images[row - first])
        partner = alike[(np.searchsorted(alike, row) + 1) % len(alike)]
        other = super().locate(int(partner))
        return replace(super().locate(row), images=other.images, image_sizes=other.image_sizes)
