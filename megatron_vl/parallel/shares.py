"""Shares of a replica's images, and what is made of them, on their way between its ranks.

Rank (t, p) of the tensor and the pipeline group has share t * P + p of T * P. So a column, the pipeline ranks of one
tensor rank, holds neighbouring shares, and only the first stage ever holds all of them.

K images of a share, padded to the longest; N images of all shares.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.sharing import WHOLE, ImageSharing
from megatron_vl.parallel.groups import Groups


def image_sharing(placement: str, groups: Groups) -> ImageSharing:
    """This rank's place among those that share images under `parallel.vision_placement`."""
    topology = groups.topology
    if placement == "split":
        return ImageSharing(size=topology.tensor_size, rank=groups.tensor_rank)
    if placement == "spread":
        rank = groups.tensor_rank * topology.pipeline_size + groups.pipeline_rank
        return ImageSharing(size=topology.model_size, rank=rank, of_step=True)
    return WHOLE


def gather_to_first_stage(share_K: Tensor, groups: Groups) -> Tensor | None:
    """All shares [N, ...] on every rank of the first stage; None elsewhere. Collective, as are all functions here."""
    pipeline, tensor = groups.collection.pp, groups.collection.tp
    column_N: Tensor | None = None
    if groups.is_first_stage:
        column_N = share_K.new_empty(len(share_K) * pipeline.size(), *share_K.shape[1:])
    parts = None if column_N is None else list(column_N.chunk(pipeline.size()))
    dist.gather(share_K.contiguous(), parts, dst=_first(pipeline), group=pipeline)
    if column_N is None or tensor.size() == 1:
        return column_N
    all_N = share_K.new_empty(len(column_N) * tensor.size(), *share_K.shape[1:])
    dist.all_gather_into_tensor(all_N, column_N, group=tensor)
    return all_N


def scatter_from_first_stage(all_N: Tensor | None, share_K: Tensor, groups: Groups) -> None:
    """Fill each rank's `share_K` of what every rank of the first stage holds; elsewhere `all_N` is None."""
    pipeline = groups.collection.pp
    parts = None
    if all_N is not None:
        column_N = all_N.chunk(groups.topology.tensor_size)[groups.tensor_rank]
        parts = [part.contiguous() for part in column_N.chunk(pipeline.size())]
    dist.scatter(share_K, parts, src=_first(pipeline), group=pipeline)


def send_from_first_stage(tensors: Sequence[Tensor], groups: Groups) -> None:
    """Overwrite the tensors of all ranks with those of the first stage."""
    pipeline = groups.collection.pp
    _wait([dist.broadcast(one, _first(pipeline), group=pipeline, async_op=True) for one in tensors])


def sum_on_first_stage(tensors: Sequence[Tensor], groups: Groups) -> None:
    """Add up each column's tensors on the first stage; elsewhere they are spoiled."""
    pipeline = groups.collection.pp
    _wait([dist.reduce(one, _first(pipeline), group=pipeline, async_op=True) for one in tensors])


def _first(group: dist.ProcessGroup) -> int:
    return dist.get_global_rank(group, 0)


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
