"""One optimizer step: forward and backward over the pipeline, one agreement between all ranks, update."""

import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from megatron_vl.data.types import Microbatch
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import run_microbatches
from megatron_vl.train.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after a step; losses and counts are global."""

    loss: float  # per supervised token
    gradient_norm: float  # before clipping
    num_tokens: int  # without padding
    num_supervised_tokens: int
    num_samples: int
    num_failed_samples: int
    num_images: int
    stop_requested: bool  # some rank has received a signal
    skipped: bool  # loss or gradients were not finite: the weights are unchanged
    seconds: float


def train_step(
    chunks: list[Any],
    optimizer: Optimizer,
    microbatches: list[Microbatch],
    groups: Groups,
    max_norm: float,
    stop_requested: bool,
) -> StepResult:
    """Train on this rank's microbatches of one global batch.

    Ranks agree by one all-reduce of a vector on gradient norm, finiteness, loss, counts and signals; reading it is
    the step's only device-to-host synchronisation. A non-finite value on any rank skips the update on all.
    """
    began = perf_counter()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_gradients()
    losses = run_microbatches(chunks, microbatches, groups)
    squares = optimizer.prepare()

    mine = torch.zeros(8, dtype=torch.float64, device=squares.device)
    mine[0] = squares
    if groups.is_last_stage and groups.tensor_rank == 0:
        mine[1], mine[2] = losses.loss_sum, losses.num_tokens
    if groups.is_first_stage and groups.tensor_rank == 0:
        mine[3:7] = torch.tensor(_counts(microbatches), dtype=torch.float64)
    mine[7] = stop_requested
    dist.all_reduce(mine)
    squares_sum, loss_sum, supervised, tokens, samples, failed, images, stops = mine.tolist()

    norm = math.sqrt(squares_sum) if squares_sum >= 0 else math.nan
    finite = math.isfinite(norm) and math.isfinite(loss_sum)
    if finite:
        optimizer.step(norm, max_norm)
    return StepResult(
        loss=loss_sum / supervised if supervised else 0.0,
        gradient_norm=norm,
        num_tokens=int(tokens),
        num_supervised_tokens=int(supervised),
        num_samples=int(samples),
        num_failed_samples=int(failed),
        num_images=int(images),
        stop_requested=stops > 0,
        skipped=not finite,
        seconds=perf_counter() - began,
    )


def _counts(microbatches: list[Microbatch]) -> list[int]:
    """Tokens, samples, failed samples and images of these microbatches."""
    units = [unit for microbatch in microbatches for unit in microbatch.units]
    return [
        sum(unit.num_tokens for unit in units),
        len(units),
        sum(len(microbatch.failed_units) for microbatch in microbatches),
        sum(unit.num_images for unit in units),
    ]
