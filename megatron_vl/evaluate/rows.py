"""Losses of units, packed into rows, at any parallel setting.

Units are dealt to data-parallel ranks in turn and packed into rows; every rank of a replica reads what its
pipeline stage needs. Shapes: S positions of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.batch import RowRule, mask_failed
from megatron_vl.data.loader import ContentRule, Loader, LoadingRule, Role, UnitReader
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.types import TEXT, Pack, StepPlan, Unit
from megatron_vl.evaluate.items import Progress, no_progress
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import agree_on_plan, run_forward

ROWS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """Per unit: summed loss and supervised tokens, fp64 [units], the same on all ranks. `failures` are examples
    of what this rank could not read: such a unit counts nothing."""

    loss_sums: Tensor
    num_tokens: Tensor
    failures: list[str]


@dataclass(frozen=True, kw_only=True)
class RowScorer:
    """Scores units with a model, wrapped for training or not. Its calls are collective over the world."""

    chunks: list[Any]
    groups: Groups
    content: ContentRule
    sequence_length: int
    progress: Progress = no_progress

    @property
    def role(self) -> Role:
        """What this rank's reader must read."""
        return Role.of_stage(is_first=self.groups.is_first_stage, is_last=self.groups.is_last_stage)

    def score(self, units: Sequence[Unit], reader: UnitReader) -> UnitScores:
        """Score units, none of which is longer than a row; all differ."""
        totals = torch.zeros(2, len(units), dtype=torch.float64)
        mine = units[self.groups.data_rank :: self.groups.topology.data_size]
        numbers = {unit: number for number, unit in enumerate(units)}
        failures: list[str] = []
        with parameters_at_rest(self.chunks):
            for batch, losses_1S in self._losses(_packs(mine, self.sequence_length), reader, failures):
                for unit, loss_sum, num_tokens in _by_unit(batch, losses_1S):
                    totals[:, numbers[unit]] = torch.tensor([loss_sum, num_tokens])
        if self.groups.tensor_rank:
            totals.zero_()  # its replica of rank 0's
        totals = totals.to(self.groups.device)
        dist.all_reduce(totals)
        return UnitScores(loss_sums=totals[0].cpu(), num_tokens=totals[1].cpu(), failures=failures)

    def _losses(
        self, packs: list[Pack], reader: UnitReader, failures: list[str]
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """Every microbatch with its losses [1, S], on the last pipeline stage; nothing elsewhere."""
        if not packs:
            return
        pipeline_size = self.groups.topology.pipeline_size
        rows_at_once = pipeline_size * -(-ROWS_AT_ONCE // pipeline_size)
        rule = RowRule(sequence_length=self.sequence_length, packing=True, micro_batch_size=1)
        planner = _FixedPlan(packs, rows_at_once, pipeline_size)
        with Loader(planner, reader, self.content, rule, self.role, LoadingRule(prefetch_steps=1)) as loader:
            for done, loaded in enumerate(islice(loader, planner.num_steps), start=1):
                failed = agree_on_plan(loaded.microbatches, loaded.plan.digest, self.groups)
                batches = [mask_failed(*pair) for pair in zip(loaded.microbatches, failed, strict=True)]
                yield from zip(batches, run_forward(self.chunks, batches, self.groups), strict=False)
                self.progress(done, planner.num_steps)
        failures += loader.failures.examples


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
        return StepPlan(
            step=self._step,
            modality=TEXT,
            text_ratio=0.0,
            text_share=1.0,
            packs=tuple(packs),
            group=0,
            digest=0,
        )


def _packs(units: Sequence[Unit], sequence_length: int) -> list[Pack]:
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


def _by_unit(batch: Microbatch, losses_1S: Tensor) -> Iterator[tuple[Unit, float, float]]:
    """Summed loss and supervised tokens of each segment."""
    if batch.loss_mask_1S is None:
        raise ValueError("the last pipeline stage was given a microbatch without loss mask")
    mask_S = batch.loss_mask_1S[0].double()
    losses_S = losses_1S[0].double().to(mask_S.device) * mask_S
    bounds = batch.cu_seqlens.tolist()
    for segment, unit in enumerate(batch.segment_units):
        if unit >= 0:
            here = slice(bounds[segment], bounds[segment + 1])
            yield batch.units[unit], float(losses_S[here].sum()), float(mask_S[here].sum())
