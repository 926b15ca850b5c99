"""Held-out loss per sample, at any parallel setting, with the right images or with other samples' images.

Samples are dealt to data-parallel ranks in turn and packed into rows; every rank of a replica reads what its
pipeline stage needs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.batch import RowRule, mask_failed
from megatron_vl.data.index import Location, SourceIndex
from megatron_vl.data.loader import ContentRule, Loader, Role
from megatron_vl.data.plan_state import PlanState
from megatron_vl.data.types import TEXT, Microbatch, Pack, StepPlan, Unit
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import agree_on_plan, run_forward

ROWS_AT_ONCE = 8


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

    chunks: list[Any]
    groups: Groups
    content: ContentRule
    sequence_length: int
    max_samples: int  # per source

    def score(self, index: SourceIndex) -> SampleScores:
        """Score the first `max_samples` samples that fit a row."""
        units = self._units(index)
        totals = torch.zeros(2, len(units), dtype=torch.float64)
        mine = range(self.groups.data_rank, len(units), self.groups.topology.data_size)
        packs = _packs([units[number] for number in mine], self.sequence_length)
        numbers = {unit.sample: number for number, unit in enumerate(units)}
        with parameters_at_rest(self.chunks):
            for batch, losses_1S in self._losses(packs, index):
                for number, loss_sum, num_tokens in _by_sample(batch, losses_1S, numbers):
                    totals[:, number] = torch.tensor([loss_sum, num_tokens])
        if self.groups.tensor_rank:
            totals.zero_()  # its replica of rank 0's
        totals = totals.to(self.groups.device)
        dist.all_reduce(totals)
        return SampleScores(loss_sums=totals[0].cpu(), num_tokens=totals[1].cpu())

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
        lengths = index.num_positions(self.content.image_tokens)
        fitting = np.flatnonzero(lengths <= self.sequence_length)[: self.max_samples]
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

    def _losses(self, packs: list[Pack], index: SourceIndex) -> Iterator[tuple[Microbatch, Tensor]]:
        """Every microbatch with its losses [1, S], on the last pipeline stage; nothing elsewhere."""
        pipeline_size = self.groups.topology.pipeline_size
        rows_at_once = pipeline_size * -(-ROWS_AT_ONCE // pipeline_size)
        rule = RowRule(sequence_length=self.sequence_length, packing=True, micro_batch_size=1)
        role = Role.of_stage(is_first=self.groups.is_first_stage, is_last=self.groups.is_last_stage)
        planner = _FixedPlan(packs, rows_at_once, pipeline_size)
        with Loader(planner, {index.name: index}, self.content, rule, role, prefetch_steps=1) as loader:
            for loaded in islice(loader, planner.num_steps):
                failed = agree_on_plan(loaded.microbatches, loaded.plan.digest, self.groups)
                batches = [mask_failed(*pair) for pair in zip(loaded.microbatches, failed, strict=True)]
                yield from zip(batches, run_forward(self.chunks, batches, self.groups), strict=False)


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


class _FixedPlan:
    """Rows laid down beforehand, some at a time, filled up to what the pipeline's schedule can run."""

    def __init__(self, packs: list[Pack], rows_at_once: int, multiple: int) -> None:
        self._groups = [packs[start : start + rows_at_once] for start in range(0, len(packs), rows_at_once)]
        for group in self._groups:
            group += group[-1:] * (-len(group) % multiple)
        self.num_steps, self._step = len(self._groups), 0

    def next(self) -> StepPlan:
        packs = self._groups[self._step % self.num_steps]  # the loader asks ahead
        self._step += 1
        return StepPlan(step=self._step, modality=TEXT, text_ratio=0.0, packs=tuple(packs), digest=0)

    def state(self) -> PlanState:
        return PlanState(step=self._step, deficit=0, fingerprint={}, lanes=())


def _packs(units: list[Unit], sequence_length: int) -> list[Pack]:
    """Units in order, as many as fit a row."""
    packs: list[list[Unit]] = []
    room = 0
    for unit in units:
        if unit.num_tokens > room:
            packs.append([])
            room = sequence_length
        packs[-1].append(unit)
        room -= unit.num_tokens
    return [Pack(units=tuple(pack)) for pack in packs]


def _by_sample(
    batch: Microbatch, losses_1S: Tensor, numbers: dict[int, int]
) -> Iterator[tuple[int, float, float]]:
    """Number of the sample, summed loss and supervised tokens of each segment."""
    if batch.loss_mask_1S is None:
        raise ValueError("the last pipeline stage was given a microbatch without loss mask")
    mask_S = batch.loss_mask_1S[0].double()
    losses_S = losses_1S[0].double().to(mask_S.device) * mask_S
    bounds = batch.cu_seqlens.tolist()
    for segment, unit in enumerate(batch.segment_units):
        if unit >= 0:
            here = slice(bounds[segment], bounds[segment + 1])
            yield numbers[batch.units[unit].sample], float(losses_S[here].sum()), float(mask_S[here].sum())
