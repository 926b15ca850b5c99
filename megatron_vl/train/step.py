"""One optimizer step: forward and backward over the pipeline, one agreement between all ranks, update."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.shard_reader import NO_TRAFFIC, Traffic
from megatron_vl.device.machine import MemoryUse
from megatron_vl.device.trail import TRAIL
from megatron_vl.model.spread import Spread
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import run_microbatches
from megatron_vl.parallel.replicas import NUM_WITNESSES, suspects
from megatron_vl.planning.topology import Topology
from megatron_vl.train.by_source import losses_by_source, tokens_by_source, told_apart
from megatron_vl.train.fullest import Fullest, fullest
from megatron_vl.train.optimizer import Optimizer
from megatron_vl.train.stragglers import Straggler, straggler

FIXED = 12  # places of the vector that all ranks add up, before those of sources and ranks
NO_MEMORY = MemoryUse(host_bytes=0, device_peak_bytes=None, device_reserved_bytes=None)


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
    num_pairs: float  # of tokens that see each other, as `planning.workload.Load` counts them
    loss_by_source: dict[str, float]  # per supervised token, of the sources that the step had
    num_tokens_by_source: dict[str, int]
    bytes_fetched: int
    bytes_used: int
    stop_requested: bool  # some rank has received a signal
    saving: bool  # some rank was writing its part of a checkpoint
    skipped: bool  # loss or gradients were not finite, or the loss a spike: the weights are unchanged
    seconds: float = math.nan  # that it took, with the agreement on its plan; the loop's to say
    straggler: Straggler | None  # of the step before
    fullest: Fullest
    corrupted: list[int]  # ranks whose parameters were not those of their replicas: the weights are unchanged


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a rank tells all others at the end of a step: whether it was asked to stop, whether it still writes a
    checkpoint, what it has planned, what it has read since the step before, how long it computed in that one, and the
    memory that it holds.

    Ranks of one `plan_group` must have one `plan_digest` (below 2^52: exact in fp64). The same on all ranks:
    `max_loss`, where a loss becomes a spike, `sources`, whose losses and tokens are told apart, and whether there are
    `witnesses`, which say what parameters a rank has computed with (`parallel.replicas`).
    """

    stop_requested: bool = False
    saving: bool = False
    plan_group: int = 0
    plan_digest: int = 0
    traffic: Traffic = NO_TRAFFIC
    compute_seconds: float = 0.0
    memory: MemoryUse = NO_MEMORY
    max_loss: float = math.inf
    sources: tuple[str, ...] = ()
    witnesses: Callable[[], Tensor] | None = None

    @property
    def of_rank(self) -> tuple[float, ...]:
        """What stands in the rank's own places; what the device says comes there later."""
        later = (0.0,) * NUM_WITNESSES if self.witnesses else ()
        return (self.plan_group, self.plan_digest, self.compute_seconds, *self.memory.to_numbers(), *later)


def train_step(
    chunks: list[Any],
    optimizer: Optimizer,
    microbatches: list[Microbatch],
    groups: Groups,
    max_norm: float,
    vote: Vote,
    spread: Spread | None = None,
) -> StepResult:
    """Train on this rank's microbatches of one global batch; `spread` encodes their images first.

    Ranks agree by one all-reduce of a vector on gradient norm, finiteness, loss, counts, signals, plans and replicas;
    reading it is the step's only device-to-host synchronisation. A non-finite value on any rank, a loss above
    `vote.max_loss`, or corrupted parameters skip the update on all.

    Raises:
        RuntimeError: ranks that deal rows among themselves have planned different ones; names the ranks.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_gradients()
    if spread is not None:
        microbatches = _encode_ahead(spread, microbatches)
    losses = run_microbatches(chunks, microbatches, groups)
    squares = optimizer.prepare()

    num_sources = len(vote.sources)
    mine = _told(microbatches, groups, vote).to(squares.device, non_blocking=True)  # the host need not wait
    mine[0] = squares
    if groups.is_last_stage and groups.tensor_rank == 0:
        mine[1], mine[2] = losses.loss_sum, losses.num_tokens
        mine[FIXED : FIXED + 2 * num_sources] = losses_by_source(losses, vote.sources)
    if vote.witnesses is not None:
        own = len(mine) - len(vote.of_rank) * (dist.get_world_size() - dist.get_rank() - 1)
        mine[own - NUM_WITNESSES : own] = vote.witnesses()
    TRAIL.at("agreement of all ranks", waits=True)
    dist.all_reduce(mine)
    result = _result(mine.tolist(), vote, groups.topology)
    TRAIL.at("update")
    if not result.skipped and not result.corrupted:
        per_token = 1.0 / max(result.num_supervised_tokens, 1)
        optimizer.step(per_token * min(1.0, max_norm / (result.gradient_norm + 1e-6)))
    return result


def _result(summed: list[float], vote: Vote, topology: Topology) -> StepResult:
    """What the vector of `_told`, added up over all ranks, says. Raises RuntimeError as `train_step` does."""
    squares, loss_sum, supervised, tokens, samples, failed, images, pairs = summed[:8]
    stops, saving, fetched, used = summed[8:FIXED]
    ranks_begin = FIXED + 3 * len(vote.sources)
    loss_by_source, num_tokens_by_source = told_apart(vote.sources, summed[FIXED:ranks_begin])
    width = len(vote.of_rank)
    by_rank = [summed[place : place + width] for place in range(ranks_begin, len(summed), width)]
    check_plans([one[0] for one in by_rank], [one[1] for one in by_rank])
    per_token = 1.0 / max(supervised, 1.0)
    norm = math.sqrt(squares) * per_token if squares >= 0 else math.nan
    loss = loss_sum * per_token
    is_sound = math.isfinite(norm) and math.isfinite(loss) and loss <= vote.max_loss
    return StepResult(
        loss=loss,
        gradient_norm=norm,
        num_tokens=int(tokens),
        num_supervised_tokens=int(supervised),
        num_samples=int(samples),
        num_failed_samples=int(failed),
        num_images=int(images),
        num_pairs=pairs,
        loss_by_source=loss_by_source,
        num_tokens_by_source=num_tokens_by_source,
        bytes_fetched=int(fetched),
        bytes_used=int(used),
        stop_requested=stops > 0,
        saving=saving > 0,
        skipped=not is_sound,
        straggler=straggler([one[2] for one in by_rank], topology.pipeline_size),
        fullest=fullest([MemoryUse.from_numbers(one[3:6]) for one in by_rank]),
        corrupted=suspects([one[6:] for one in by_rank], topology) if vote.witnesses else [],
    )


def _told(microbatches: list[Microbatch], groups: Groups, vote: Vote) -> Tensor:
    """What the host knows of the vector that all ranks add up: FIXED places, of which 0 to 2 are for what the device
    computes; three for each source, of which the device computes two; those of each rank."""
    of_rank = vote.of_rank
    by_source = FIXED + 2 * len(vote.sources)
    by_rank = by_source + len(vote.sources)
    told = torch.zeros(by_rank + len(of_rank) * dist.get_world_size(), dtype=torch.float64)
    if groups.is_first_stage and groups.tensor_rank == 0:
        told[3:8] = torch.tensor(_counts(microbatches), dtype=torch.float64)
        told[by_source:by_rank] = torch.tensor(
            tokens_by_source(microbatches, vote.sources), dtype=torch.float64
        )
    told[8:FIXED] = torch.tensor(
        [vote.stop_requested, vote.saving, vote.traffic.bytes_fetched, vote.traffic.bytes_used],
        dtype=torch.float64,
    )
    mine = by_rank + len(of_rank) * dist.get_rank()
    told[mine : mine + len(of_rank)] = torch.tensor(of_rank, dtype=torch.float64)
    return told


def _encode_ahead(spread: Spread, microbatches: list[Microbatch]) -> list[Microbatch]:
    """The microbatches with features in place of this rank's share of all their images."""
    images = [one.images_NCHW for one in microbatches if one.images_NCHW is not None]
    features = spread.encode(images, [one.num_images for one in microbatches])
    pairs = zip(microbatches, features, strict=True)
    return [replace(one, images_NCHW=None, features_NTC=of_one) for one, of_one in pairs]


def check_plans(plan_groups: list[float], digests: list[float]) -> None:
    """By rank. Raises RuntimeError naming those that differ from the first rank of their group."""
    first: dict[float, int] = {}
    differing = [
        rank
        for rank, group in enumerate(plan_groups)
        if digests[rank] != digests[first.setdefault(group, rank)]
    ]
    if differing:
        others = sorted({first[plan_groups[rank]] for rank in differing})
        raise RuntimeError(
            f"ranks {differing} planned other rows than rank(s) {others} of their group; all must run the same code on "
            "the same index"
        )


def _counts(microbatches: list[Microbatch]) -> list[float]:
    """Tokens, samples, failed samples, images and pairs of these microbatches."""
    units = [unit for microbatch in microbatches for unit in microbatch.units]
    return [
        sum(unit.num_tokens for unit in units),
        len(units),
        sum(len(microbatch.failed_units) for microbatch in microbatches),
        sum(unit.num_images for unit in units),
        sum(unit.num_tokens**2 for unit in units) / 2,
    ]
