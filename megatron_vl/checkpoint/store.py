"""Saving and loading through megatron-core's distributed checkpoints.

A checkpoint is a folder `<stage>-<step>` with the sharded tensors (weights, optimizer, random states), `model.json`
and the tokenizer (what the weights are), and `state.json` (where the run stood). It is written aside and renamed when
every rank has finished and its files are on disk, so a folder that carries the name is whole.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import (
    get_default_save_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_vl.checkpoint.description import (
    Description,
    check_same_weights,
    read_description,
    write_description,
)
from megatron_vl.checkpoint.state import ASIDE, STATE_FILE, RunState, read_state, whole_checkpoints
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.parallel.groups import Groups

# Resumes at any parallel size; it gathers all optimizer state over data-parallel ranks, which small models bear.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "fully_reshardable_mem_efficient": False}

RANDOM = "random"
# TransformerEngine's layers keep fp8 scales under this name. Ours have none, and other layers lack the entries.
EXTRA_STATE = "_extra_state"


class CheckpointStore:
    """The checkpoints of one run directory. Its methods are collective over the world.

    Each gets the `description` of the weights and the tokenizer files beside `tokenizer`.
    """

    def __init__(self, folder: Path, keep: int, description: Description, tokenizer: Path) -> None:
        self.folder, self.keep = folder, keep
        self.description, self.tokenizer = description, tokenizer

    def save(self, state: RunState, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups) -> Path:
        """Write a checkpoint and drop the oldest beyond `keep`."""
        path = self.folder / f"{state.stage}-{state.step:08d}"
        aside = path.with_suffix(ASIDE)
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
            aside.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(
            _sharded_state(chunks, optimizer, groups),
            str(aside),
            get_default_save_sharded_strategy("torch_dist", 1),
        )
        if dist.get_rank() == 0:
            write_description(aside, self.description, self.tokenizer.parent)
            _write_synced(aside / STATE_FILE, json.dumps(asdict(state)))
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            _sync_folder(self.folder)
            self._drop_old()
        dist.barrier()
        return path

    def _drop_old(self) -> None:
        whole = sorted(whole_checkpoints(self.folder), key=lambda path: read_state(path).global_step)
        for path in whole[: -self.keep]:
            shutil.rmtree(path)


def load_training_state(path: Path, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups) -> None:
    """Load weights, optimizer and random states into this rank's wrapped chunks, at any parallel size. Collective.

    Random states belong to ranks: where a checkpoint has none for these parallel sizes, they stay as they are.

    Raises:
        UserError: the checkpoint lacks something that this model trains with, or holds something else.
    """
    wanted = _sharded_state(chunks, optimizer, groups, is_loading=True)
    stored = set(load_sharded_metadata(str(path)))
    if wanted[RANDOM].unique_key not in stored:
        del wanted[RANDOM]
    _check_keys(path, stored, wanted)
    loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    _load_chunks(loaded, _modules(chunks))
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
    wanted = _sharded_weights(chunks)
    try:
        loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} does not hold this model's weights: {error}") from error
    _load_chunks(loaded, chunks)


def _sharded_state(
    chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups, is_loading: bool = False
) -> dict[str, Any]:
    """Names to megatron-core's sharded values."""
    state = _sharded_weights(_modules(chunks))
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=SHARDING)
    state[RANDOM] = _random_states(groups)
    return state


def _random_states(groups: Groups) -> ShardedObject:
    values = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    sizes = (groups.topology.pipeline_size, groups.topology.tensor_size)
    place = (groups.pipeline_rank, groups.tensor_rank)
    return ShardedObject(RANDOM, [values], sizes, place, replica_id=groups.data_rank)


def _modules(chunks: list[Any]) -> list[Any]:
    return [chunk.module for chunk in chunks]


def _sharded_weights(modules: list[Any]) -> dict[str, Any]:
    return {
        f"chunk{index}": {
            name: value
            for name, value in module.sharded_state_dict().items()
            if not name.endswith(EXTRA_STATE)
        }
        for index, module in enumerate(modules)
    }


def _load_chunks(loaded: dict[str, Any], modules: list[Any]) -> None:
    for index, module in enumerate(modules):
        missing, unexpected = module.load_state_dict(loaded[f"chunk{index}"], strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise RuntimeError(f"weights left out: {missing}; unknown weights: {unexpected}")


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


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
