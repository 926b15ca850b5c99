"""Where in the optimizer's buckets each parameter lies: it comes with `dp_reshardable` checkpoints, to tell which runs
can resume from them, and to reshard them for others.

A bucket is a flat stretch of parameters, which data-parallel ranks divide without regard to where one ends. Its
checkpoint is one flat tensor for the parameters and one for each moment, `<bucket>.param`, `.exp_avg`, `.exp_avg_sq`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer

from megatron_vl.checkpoint.sharded import sharded_weights, tensors, unwrapped
from megatron_vl.checkpoint.sharding import DP_RESHARDABLE
from megatron_vl.parallel.groups import Groups

OPTIMIZER_FILE = "optimizer.json"
STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor, `tensor[offset : offset + size]` in each dimension, from element `start` of a bucket."""

    tensor: str
    shape: list[int]  # of the whole tensor
    offset: list[int]
    size: list[int]
    start: int


@dataclass(frozen=True)
class Bucket:
    """`name` is that of its tensors in the checkpoint, without the state's; pieces stand in order."""

    name: str
    num_elements: int
    pieces: list[Piece]


@dataclass(frozen=True)
class OptimizerLayout:
    """How a checkpoint stores its optimizer; the buckets of all model-parallel ranks, where they are what is stored."""

    sharding: str
    buckets: list[Bucket]

    def write(self, folder: Path) -> None:
        (folder / OPTIMIZER_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_layout(folder: Path) -> OptimizerLayout:
    """That of a checkpoint that training wrote."""
    values = json.loads((folder / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    buckets = [
        Bucket(one["name"], one["num_elements"], [Piece(**piece) for piece in one["pieces"]])
        for one in values["buckets"]
    ]
    return OptimizerLayout(values["sharding"], buckets)


def layout_here(
    sharding: str, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups
) -> OptimizerLayout:
    """What these ranks would write. Collective over the world."""
    if sharding != DP_RESHARDABLE:
        return OptimizerLayout(sharding, [])
    mine = list(_own_buckets(chunks, optimizer)) if groups.data_rank == 0 else []
    by_rank: list[list[Bucket]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, mine)
    return OptimizerLayout(sharding, [bucket for buckets in by_rank for bucket in buckets])


def has_bare_bucket(optimizer: MegatronOptimizer) -> bool:
    """Whether this data-parallel rank's share of some bucket is padding alone: megatron-core cannot store that."""
    return any(
        not shard["param_map"]
        for part in _parts(optimizer)
        for ranges in part.gbuf_ranges
        for shards in ranges.values()
        for shard in shards
    )


def _own_buckets(chunks: list[Any], optimizer: MegatronOptimizer) -> Iterator[Bucket]:
    values = {id(value.data): value for value in tensors(sharded_weights(unwrapped(chunks)))}
    for part in _parts(optimizer):
        for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
            (dtypes,) = ranges
            prefix = f"optimizer.distributed.dp_group_idx_{part.data_parallel_group_idx}"
            for index, bucket in enumerate(buffer.buckets):
                starts = sorted(
                    (
                        (buffer.param_index_map[parameter][0] - bucket.offset, parameter)
                        for parameter in bucket.params
                    ),
                    key=lambda pair: pair[0],
                )
                yield Bucket(
                    name=f"{prefix}.gbuf_idx_{number}.dtype_{dtypes}.bucket_idx_{index}",
                    num_elements=bucket.numel_unpadded,
                    pieces=[
                        piece
                        for start, parameter in starts
                        for piece in _pieces(values[id(parameter)], start)
                    ],
                )


def _pieces(value: ShardedTensor | ShardedTensorFactory, start: int) -> Iterator[Piece]:
    """A factory's tensors (SwiGLU's two halves) lie one after the other in the parameter."""
    parts: Sequence[ShardedTensor] = (
        list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
    )
    begin = value.data.data_ptr()
    for part in parts:
        if not part.data.is_contiguous() or part.data.data_ptr() != begin:
            raise RuntimeError(f"{part.key} is not one stretch of its parameter")
        yield Piece(
            part.key, list(part.global_shape), list(part.global_offset), list(part.local_shape), start
        )
        start += part.data.numel()
        begin += part.data.nbytes


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
