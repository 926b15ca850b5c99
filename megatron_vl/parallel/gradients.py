"""Gradients across ranks: megatron-core's DistributedDataParallel and the hooks its schedules call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.parallel.groups import Groups


def distribute(
    chunks: list[MegatronModule], config: TransformerConfig, parallel: ParallelConfig, groups: Groups
) -> list[DistributedDataParallel]:
    """Wrap this rank's chunks, already frozen as the stage wants, and set the schedule's hooks in `config`.

    Gradients accumulate and reduce in fp32 whatever the parameters' precision. The chunk that holds stage zero
    has one bucket where vision parameters train: a text-only microbatch gives them all their (zero) gradients at
    once, and with several buckets the data-parallel ranks would start their reductions in different orders.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=len(chunks) > 1,  # begun by the schedule: no bucket begins the next one's
    )
    wrapped = [
        DistributedDataParallel(
            config,
            ddp_config,
            chunk,
            disable_bucketing=index > 0 or _trains_vision(chunk),
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = partial(_sum_over_ranks, pg_collection=groups.collection)
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    if parallel.overlap_param_gather and len(chunks) > 1:
        config.param_sync_func = [_begin_gathering(chunk) for chunk in wrapped]
    return wrapped


def _begin_gathering(chunk: DistributedDataParallel) -> Callable[..., None]:
    """What the interleaved schedule calls ahead of a chunk's first forward pass.

    Vision parameters that train are gathered by the first module to need them: on a step without images none may,
    and a gather that has begun would never be waited for.
    """
    return _nothing if _trains_vision(chunk.module) else chunk.start_param_sync


def _nothing(parameters: Iterator[Tensor]) -> None:
    """No gather."""


def _sum_over_ranks(
    chunks: list[DistributedDataParallel], num_tokens: Tensor | None, **arguments: Any
) -> None:
    """Finish the reductions. Given `num_tokens`, megatron-core would read it back from the device, to divide all
    gradients by it: the optimizer's step does that, with the number that all ranks agree on anyway."""
    finalize_model_grads(chunks, None, **arguments)


def _trains_vision(chunk: MegatronModule) -> bool:
    return any(
        parameter.requires_grad and name.startswith(("stage_zero.towers.", "stage_zero.adaptor."))
        for name, parameter in chunk.named_parameters()
    )


@contextmanager
def parameters_at_rest(chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """Every parameter holds the optimizer's last step, and forward passes gather none: for saving and evaluating.

    Collective over the data-parallel group. Chunks that `distribute` has not wrapped are at rest anyway.
    """
    wrapped = [chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel)]
    overlapped = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
