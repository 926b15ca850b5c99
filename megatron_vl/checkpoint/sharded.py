"""What of a stage goes into a checkpoint, as megatron-core's sharded values: weights, optimizer, random states."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

from megatron_vl.checkpoint.sharding import DP_RESHARDABLE
from megatron_vl.parallel.groups import Groups

RANDOM = "random"
# TransformerEngine's layers keep fp8 scales under this name. Ours have none, and other layers lack the entries.
EXTRA_STATE = "_extra_state"


def sharded_state(
    chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups, sharding: str, is_loading: bool = False
) -> dict[str, Any]:
    """Names to megatron-core's sharded values, of wrapped chunks. Collective where `sharding` gathers, and nothing is
    loading."""
    state = sharded_weights(unwrapped(chunks))
    how = {"distrib_optim_sharding_type": sharding, "fully_reshardable_mem_efficient": False}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=how)
    if sharding == DP_RESHARDABLE and not is_loading:
        _clear_padding(state["optimizer"])
    state[RANDOM] = _random_states(groups)
    return state


def sharded_weights(modules: list[Any]) -> dict[str, Any]:
    """The weights alone, of chunks that are not wrapped."""
    return {
        f"chunk{index}": {
            name: value
            for name, value in module.sharded_state_dict().items()
            if not name.endswith(EXTRA_STATE)
        }
        for index, module in enumerate(modules)
    }


def unwrapped(chunks: list[Any]) -> list[Any]:
    return [chunk.module for chunk in chunks]


def num_trained(chunks: list[Any]) -> int:
    """Parameters of this rank's wrapped chunks that train."""
    return sum(
        parameter.numel() for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad
    )


def tensors(state: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """All tensors of a sharded state."""
    return (
        value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)
    )


def _clear_padding(state: Any) -> None:
    """megatron-core leaves between parameters whatever was in memory: equal states would make unequal files."""
    if isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return
    padding = state.get("padding")
    if isinstance(padding, LocalNonpersistentObject) and padding.unwrap():
        for value in tensors(state):
            value.data.zero_()
    for value in state.values():
        _clear_padding(value)


def _random_states(groups: Groups) -> ShardedObject:
    values = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    sizes = (groups.topology.pipeline_size, groups.topology.tensor_size)
    place = (groups.pipeline_rank, groups.tensor_rank)
    return ShardedObject(RANDOM, [values], sizes, place, replica_id=groups.data_rank)
