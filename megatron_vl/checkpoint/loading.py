"""Loading checkpoints into the model of this rank, at any parallel size that their optimizer's layout allows."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_vl.checkpoint.buckets import OptimizerLayout, has_bare_bucket, layout_here, read_layout
from megatron_vl.checkpoint.description import check_same_weights, read_description
from megatron_vl.checkpoint.sharded import EXTRA_STATE, RANDOM, sharded_state, sharded_weights, unwrapped
from megatron_vl.checkpoint.sharding import DP_RESHARDABLE
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.groups import Groups

RESHARDED = ".resharded"


def load_training_state(path: Path, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups) -> None:
    """Load weights, optimizer and random states into this rank's wrapped chunks. They may have trained: all goes back
    to where the checkpoint stood. Collective over the world.

    Random states belong to ranks: where a checkpoint has none for these parallel sizes, they stay as they are.

    Raises:
        UserError: the checkpoint lacks something that this model trains with, or holds something else, or its optimizer
            is stored for other parallel sizes; names the command that makes it fit.
    """
    layout = read_layout(path)
    if layout.sharding == DP_RESHARDABLE:
        _check_buckets(path, layout, chunks, optimizer, groups)
    with parameters_at_rest(chunks), torch.no_grad():  # in fp32 the optimizer's parameters are the model's
        wanted = sharded_state(chunks, optimizer, groups, layout.sharding, is_loading=True)
        stored = set(load_sharded_metadata(str(path)))
        if wanted[RANDOM].unique_key not in stored:
            del wanted[RANDOM]
        _check_keys(path, stored, wanted)
        loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
        _load_chunks(loaded, unwrapped(chunks))
        optimizer.load_state_dict(loaded["optimizer"])
    if RANDOM in loaded:
        random_states = loaded[RANDOM][0]
        torch.set_rng_state(random_states["torch"])
        tensor_parallel.get_cuda_rng_tracker().set_states(random_states["tracker"])


def load_weights(path: Path, chunks: list[Any], model: ModelConfig) -> None:
    """Load model weights alone into chunks not wrapped yet, at any parallel size. Collective.

    Raises:
        UserError: `path` is no checkpoint, or its weights are not those of `model`.
    """
    check_same_weights(path, read_description(path).model, model)
    wanted = sharded_weights(chunks)
    try:
        loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} does not hold this model's weights: {error}") from error
    _load_chunks(loaded, chunks)


def _load_chunks(loaded: dict[str, Any], modules: list[Any]) -> None:
    for index, module in enumerate(modules):
        missing, unexpected = module.load_state_dict(loaded[f"chunk{index}"], strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise RuntimeError(f"weights left out: {missing}; unknown weights: {unexpected}")


def _check_buckets(
    path: Path, stored: OptimizerLayout, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups
) -> None:
    """Only where every bucket holds the same parameters at the same places can ranks load their shares of it."""
    bare: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(bare, has_bare_bucket(optimizer))
    if stored == layout_here(DP_RESHARDABLE, chunks, optimizer, groups) and not any(bare):
        return
    topology = groups.topology
    sizes = {
        "tensor_size": topology.tensor_size,
        "pipeline_size": topology.pipeline_size,
        "virtual_size": topology.virtual_size,
        "layout": f"'\"{chunks[0].config.pipeline_model_parallel_layout}\"'"
        if topology.pipeline_size > 1
        else 1,
    }
    words = " ".join(f"parallel.{name}={value}" for name, value in sizes.items() if value != 1)
    raise UserError(
        f"{path} stores its optimizer as ranks of other parallel sizes or another layout held it (checkpoint."
        f"optimizer_sharding={DP_RESHARDABLE}). Make one that fits: python -m launch.convert direction=reshard "
        f"checkpoint={path} output={path}{RESHARDED} {words}".rstrip()
        + "; then start this run again"
    )


def _check_keys(path: Path, stored: set[str], wanted: dict[str, Any]) -> None:
    """Before anything is read: megatron-core's own check cannot let other sizes' random states be. Collective."""
    mine = {
        value.unique_key if isinstance(value, ShardedObject) else value.key
        for value in nested_values(wanted)
        if isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject)
    }
    by_rank: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(by_rank, mine)
    requested = set().union(*by_rank)
    unread = {key for key in stored if not key.startswith(RANDOM) and not key.endswith(EXTRA_STATE)}
    absent, left_over = requested - stored, unread - requested
    if absent or left_over:
        raise UserError(
            f"{path} is of other training: it lacks {_listed(absent)}; it has, and this run has not, "
            f"{_listed(left_over)}"
        )


def _listed(keys: set[str]) -> str:
    return (
        ", ".join(sorted(keys)[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "") or "nothing"
    )
