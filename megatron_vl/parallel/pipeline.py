"""One forward-backward pass over the pipeline: microbatches in, summed losses out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vl.data.microbatch import Microbatch
from megatron_vl.device.trail import TRAIL
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.vision import vision_input
from megatron_vl.planning.schedule import smallest_group


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """Sums over this rank's microbatches, on the last pipeline stage; zero elsewhere. Device tensors, no sync."""

    loss_sum: Tensor  # fp64 scalar
    num_tokens: Tensor  # int64 scalar: supervised tokens
    segment_sums: list[Tensor]  # fp64 [segments, 2] of each microbatch: the same two sums, segment by segment
    segment_sources: list[str | None]  # of all these segments; None is padding


def run_microbatches(
    chunks: list[Any], microbatches: list[Microbatch], groups: Groups, forward_only: bool = False
) -> PassResult:
    """Run megatron-core's schedule for this parallel setting; gradients are summed over all ranks' tokens, and not
    yet divided by their number.

    All microbatches of a step have the same number of tokens on every rank of a replica.
    """
    outputs = _run_schedule(chunks, microbatches, partial(_sum_losses, groups=groups), groups, forward_only)
    loss_sum = torch.zeros((), dtype=torch.float64, device=groups.device)
    num_tokens = torch.zeros((), dtype=torch.int64, device=groups.device)
    for output in outputs:
        loss_sum += output["loss_sum"]
        num_tokens += output["num_tokens"]
    return PassResult(
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        segment_sums=[output["segment_sums"] for output in outputs],
        segment_sources=[source for output in outputs for source in output["segment_sources"]],
    )


def run_forward(chunks: list[Any], microbatches: list[Microbatch], groups: Groups) -> list[Tensor]:
    """Forward only. Returns per microbatch, on the last stage, the losses of all positions [1, S] (or logits
    where the microbatch has no labels); an empty list elsewhere."""
    with torch.no_grad():
        outputs = _run_schedule(chunks, microbatches, _keep_output, groups, forward_only=True)
    return [output["output"] for output in outputs]


def _run_schedule(
    chunks: list[Any], microbatches: list[Microbatch], loss_of: Any, groups: Groups, forward_only: bool
) -> list[dict[str, Any]]:
    topology = groups.topology
    schedule = get_forward_backward_func(
        pp_size=topology.pipeline_size,
        vp_size=topology.virtual_size if topology.virtual_size > 1 else None,
    )
    if topology.virtual_size > 1:  # one default would not do: evaluation has other numbers of microbatches
        group_size = smallest_group(len(microbatches), topology.pipeline_size)
        chunks[0].config.microbatch_group_size_per_vp_stage = group_size
    iterators = [iter(microbatches) for _ in chunks]
    outputs: list[dict[str, Any]] = schedule(
        forward_step_func=partial(_forward_step, loss_of=loss_of, device=groups.device),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return outputs


def _forward_step(
    iterator: Iterator[Microbatch], chunk: MegatronModule, loss_of: Any, device: torch.device
) -> tuple[Tensor, Any]:
    microbatch = next(iterator).to(device)
    output = chunk(
        microbatch.tokens_1S,
        vision_input(microbatch),
        microbatch.labels_1S,
        microbatch.cu_seqlens,
        microbatch.max_seqlen,
    )
    return output, partial(loss_of, microbatch)


def _sum_losses(
    microbatch: Microbatch, losses_1S: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    mask_1S = microbatch.loss_mask_1S
    if mask_1S is None:
        raise ValueError("the last pipeline stage was given a microbatch without loss mask")
    loss_sum = (losses_1S * mask_1S).sum()
    num_tokens = mask_1S.sum().to(torch.int32)
    # The schedule scales the loss in place: what is reported must be a copy.
    report = {
        "loss_sum": loss_sum.detach().clone(),
        "num_tokens": num_tokens.detach().clone(),
        "segment_sums": _by_segment(losses_1S.detach(), mask_1S, microbatch.cu_seqlens),
        "segment_sources": [
            None if unit < 0 else microbatch.units[unit].source for unit in microbatch.segment_units
        ],
    }
    return loss_sum, num_tokens, report


def _by_segment(losses_1S: Tensor, mask_1S: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[segments, 2]: sums of the supervised losses, and their number. One that is not finite stays in its segment."""
    positions_S = torch.arange(losses_1S.shape[1], device=losses_1S.device)
    segments_S = torch.bucketize(positions_S, cu_seqlens[1:], right=True)
    values_S2 = torch.stack([losses_1S[0] * mask_1S[0], mask_1S[0]], dim=1).double()
    return values_S2.new_zeros(len(cu_seqlens) - 1, 2).index_add_(0, segments_S, values_S2)


def _keep_output(microbatch: Microbatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), {"output": output.detach()}


def run_chain(
    chunks: list[Any],
    run_chunk: Callable[[Any, Tensor | None], Tensor],
    hidden_shape: Sequence[int],
    groups: Groups,
) -> Tensor | None:
    """Forward one row through all (virtual) stages without a schedule: for rows whose shape changes from one to
    the next, and of which each waits for the one before it, as in generation.

    `run_chunk` takes a chunk and what the stage before it made (None for the first one). What stages exchange has
    `hidden_shape`. Returns what the last chunk made, on the last stage; None elsewhere.
    """
    pipeline = groups.collection.pp
    ranks = dist.get_process_group_ranks(pipeline)
    before, after = ranks[groups.pipeline_rank - 1], ranks[(groups.pipeline_rank + 1) % len(ranks)]
    made: Tensor | None = None
    TRAIL.at("generation")
    for index, chunk in enumerate(chunks):
        received = None
        if index > 0 or not groups.is_first_stage:
            dtype = chunk.config.pipeline_dtype
            received = torch.empty(hidden_shape, dtype=dtype, device=groups.device)
            dist.recv(received, before, group=pipeline)
        made = run_chunk(chunk, received)
        if index < len(chunks) - 1 or not groups.is_last_stage:
            dist.send(made.contiguous(), after, group=pipeline)
    return made if groups.is_last_stage else None


def agree_on_plan(microbatches: list[Microbatch], digest: int, groups: Groups) -> list[tuple[int, ...]]:
    """Check that all ranks of a replica are about to train on the same plan, and tell them which units one of them
    could not decode, per microbatch.

    One message of 24 bytes between hosts, which has one size whatever they have planned, and where a sample did not
    decode another one of 8 bytes a unit. `digest` has 63 bits.

    Raises:
        RuntimeError: another rank of the replica has planned another step.
    """
    here = [microbatch.failed_units for microbatch in microbatches]
    if groups.topology.model_size == 1:
        return here
    highest, lowest, some_failed = groups.control.maximum(
        torch.tensor([digest, -digest, any(here)], dtype=torch.int64)
    ).tolist()
    if highest != -lowest:
        raise RuntimeError(
            f"ranks of one replica planned different steps: digests {-lowest} to {highest}, here {digest}; they must "
            "run the same code on the same index"
        )
    if not some_failed:
        return here
    failed = torch.zeros(
        len(here), max(len(microbatch.units) for microbatch in microbatches), dtype=torch.int64
    )
    for row, units in zip(failed, here, strict=True):
        row[list(units)] = 1
    return [tuple(row.nonzero().flatten().tolist()) for row in groups.control.maximum(failed)]
