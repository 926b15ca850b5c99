"""Checkpoints read and written tensor by tensor, in one process: what is converted never lies in memory whole.

The files are those of torch's distributed checkpoints, as megatron-core writes them, so that any number of ranks
loads them at any parallel size.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_vl.config.errors import UserError

COMMON_FILE = "common.pt"  # what megatron-core keeps beside sharded tensors


@dataclass(frozen=True)
class Entry:
    """A tensor to come: its shape and dtype, and how to make it when it is written."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device, and asks for their values when it is their turn."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self._entries = entries

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        entry, tensor = self._entries[index.fqn], self._entries[index.fqn].read()
        if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(f"{index.fqn}: {tensor.dtype} {tuple(tensor.shape)} is not {entry}")
        return tensor.contiguous()


def write_tensors(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write these tensors into an empty folder, which then is to be sealed and synced. One of them is in memory at a
    time."""
    planned = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()
    }
    # A file for each tensor: the writer keeps the tensors of a file until it is complete.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
    with _alone():
        dcp.save(planned, storage_writer=writer, planner=_LazyPlanner(entries), no_dist=True)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
    if not (folder / COMMON_FILE).exists():
        torch.save({}, folder / COMMON_FILE)


def read_tensors(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint, each read when it is asked for.

    Raises:
        UserError: the folder holds no such checkpoint.
    """
    reader = CachedMetadataFileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
    except Exception as error:  # a torn pickle raises many kinds
        raise UserError(f"{folder} is not a whole checkpoint: {error}") from error

    def entry(name: str, stored: TensorStorageMetadata) -> Entry:
        def read() -> Tensor:
            values = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
            with _alone():
                dcp.load(values, storage_reader=reader, no_dist=True)
            return values[name]

        return Entry(stored.size, stored.properties.dtype, read)

    return {
        name: entry(name, stored)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


class Slices:
    """Stretches of a checkpoint's flat tensors, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._reader = CachedMetadataFileSystemReader(folder)

    def read(self, name: str, start: int, num_elements: int) -> Tensor:
        """`num_elements` of the flat tensor `name`, from `start`."""
        stored = self._reader.read_metadata().state_dict_metadata[name]
        values = torch.empty(num_elements, dtype=stored.properties.dtype)
        wanted = ShardedTensor(
            name,
            values,
            values.dtype,
            (num_elements,),
            tuple(stored.size),
            (start,),
            axis_fragmentations=None,
        )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _alone():
            dcp.load(
                {name: CheckpointableShardedTensor.from_sh_ten(wanted)},
                storage_reader=self._reader,
                planner=planner,
                no_dist=True,
            )
        return values


def read_object(folder: Path, name: str) -> Any:
    """What is no tensor, of plain values; nothing else is unpickled."""
    planner = _BytesPlanner()
    with _alone():
        dcp.load(
            {name: io.BytesIO()}, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True
        )
    return torch.load(planner.found, weights_only=True)


class _BytesPlanner(DefaultLoadPlanner):
    """Hands over what was stored as it is, where torch's planner would unpickle it."""

    found: io.BytesIO

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.found = value


@contextmanager
def _alone() -> Iterator[None]:
    """One process is what is meant: torch need not say so, nor wrap its errors as those of a rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise error.failures[0][0] from error
