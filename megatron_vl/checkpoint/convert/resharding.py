"""A training checkpoint, optimizer included, for other parallel sizes or another layout.

Weights are stored by their place in the whole model, so their values stay as they are: each becomes one piece again.
So are the optimizer's, or they are gathered from the buckets that ranks held. Random states, which belong to ranks, are
left out.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.checkpoint.buckets import STATES, OptimizerLayout, Piece, read_layout
from megatron_vl.checkpoint.convert.aside import whole_folder
from megatron_vl.checkpoint.convert.progress import shown
from megatron_vl.checkpoint.description import (
    TOKENIZER_FOLDER,
    read_description,
    write_description,
)
from megatron_vl.checkpoint.manifest import damage, seal
from megatron_vl.checkpoint.sharding import DP_RESHARDABLE, FULLY_RESHARDABLE
from megatron_vl.checkpoint.state import STATE_FILE
from megatron_vl.checkpoint.streaming import (
    COMMON_FILE,
    Entry,
    Slices,
    read_object,
    read_tensors,
    write_tensors,
)
from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.planning.layout import divide

OF_OPTIMIZER = "optimizer.state."  # by parameter: optimizer.state.exp_avg.<its name>
OF_BUCKETS = "optimizer.distributed."


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """What was written."""

    num_tensors: int
    num_bytes: int
    layout: str


def reshard(checkpoint: Path, output: Path, parallel: ParallelConfig) -> Resharded:
    """Write `checkpoint` anew so that training goes on from `output` with `parallel`.

    Raises:
        UserError: the model cannot be divided so, or the checkpoint has no optimizer state or is broken.
    """
    description = read_description(checkpoint)
    language = description.model.language
    _, layout = divide(language, parallel, parallel.tensor_size * parallel.pipeline_size)
    wrong = damage(checkpoint)
    if wrong is not None:
        raise UserError(f"{checkpoint} is damaged: {wrong}")
    if not (checkpoint / STATE_FILE).exists():
        raise UserError(
            f"{checkpoint} has no optimizer state: weights alone need no resharding, checkpoint.initial reads them "
            "at any parallel size"
        )
    stored = read_layout(checkpoint)
    entries = _entries(checkpoint, stored)
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    with whole_folder(output, num_bytes) as aside:
        _write_common(checkpoint, aside, stored)
        with shown(entries, "resharding") as watched:
            write_tensors(aside, watched)
        write_description(aside, description, checkpoint / TOKENIZER_FOLDER)
        OptimizerLayout(FULLY_RESHARDABLE, []).write(aside)
        shutil.copyfile(checkpoint / STATE_FILE, aside / STATE_FILE)
        seal(aside, {})
    return Resharded(num_tensors=len(entries), num_bytes=num_bytes, layout=layout)


def _entries(checkpoint: Path, stored: OptimizerLayout) -> dict[str, Entry]:
    """Every tensor of the whole model and of its optimizer, by parameter."""
    entries = read_tensors(checkpoint)
    if stored.sharding != DP_RESHARDABLE:
        return entries
    weights = {name: entry for name, entry in entries.items() if not name.startswith(OF_BUCKETS)}
    return weights | dict(_gathered(checkpoint, stored))


def _gathered(checkpoint: Path, stored: OptimizerLayout) -> Iterator[tuple[str, Entry]]:
    slices = Slices(checkpoint)
    by_tensor: dict[str, dict[tuple[int, ...], tuple[str, Piece]]] = {}
    for bucket in stored.buckets:
        for piece in bucket.pieces:  # of those that several ranks have, the first will do
            by_tensor.setdefault(piece.tensor, {}).setdefault(tuple(piece.offset), (bucket.name, piece))

    def entry(state: str, pieces: list[tuple[str, Piece]]) -> Entry:
        def read() -> Tensor:
            whole = torch.empty(pieces[0][1].shape)
            for bucket, piece in pieces:
                box = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.size, strict=True))
                num_elements = torch.Size(piece.size).numel()
                values = slices.read(f"{bucket}.{state}", piece.start, num_elements)
                whole[box] = values.view(piece.size)
            return whole

        return Entry(torch.Size(pieces[0][1].shape), torch.float32, read)

    for tensor, by_offset in by_tensor.items():
        for state in STATES:
            yield f"{OF_OPTIMIZER}{state}.{tensor}", entry(state, list(by_offset.values()))


def _write_common(checkpoint: Path, aside: Path, stored: OptimizerLayout) -> None:
    """What is not sharded: of buckets, each group of ranks has stored the same settings of its own optimizer."""
    if stored.sharding != DP_RESHARDABLE:
        shutil.copyfile(checkpoint / COMMON_FILE, aside / COMMON_FILE)
        return
    common = torch.load(checkpoint / COMMON_FILE, weights_only=True)
    (settings,) = read_object(checkpoint, f"{OF_BUCKETS}dp_group_idx_0.optimizer/shard_0_1")
    common["optimizer"] = {"optimizer": settings, "param_state_sharding_type": FULLY_RESHARDABLE}
    torch.save(common, aside / COMMON_FILE)
