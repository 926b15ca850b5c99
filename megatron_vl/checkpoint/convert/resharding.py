"""A training checkpoint, optimizer included, for other parallel sizes or another layout.

Tensors are stored by their place in the whole model, so the values stay as they are: what changes is that each
becomes one piece again, and that the random states, which belong to ranks, are left out.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.checkpoint.convert.aside import whole_folder
from megatron_vl.checkpoint.convert.progress import shown
from megatron_vl.checkpoint.description import (
    TOKENIZER_FOLDER,
    read_description,
    write_description,
)
from megatron_vl.checkpoint.state import STATE_FILE
from megatron_vl.checkpoint.streaming import COMMON_FILE, read_tensors, write_tensors
from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.planning.layout import divide

OPTIMIZER_STATE = "optimizer.state.param."  # the fp32 copy of each parameter that trains


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
    entries = read_tensors(checkpoint)
    if not (checkpoint / STATE_FILE).exists() or not any(
        name.startswith(OPTIMIZER_STATE) for name in entries
    ):
        raise UserError(
            f"{checkpoint} has no optimizer state: weights alone need no resharding, checkpoint.initial reads them "
            "at any parallel size"
        )
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    with whole_folder(output, num_bytes) as aside:
        shutil.copyfile(checkpoint / COMMON_FILE, aside / COMMON_FILE)
        with shown(entries, "resharding") as watched:
            write_tensors(aside, watched)
        write_description(aside, description, checkpoint / TOKENIZER_FOLDER)
        shutil.copyfile(checkpoint / STATE_FILE, aside / STATE_FILE)
    return Resharded(
        num_tensors=len(entries),
        num_bytes=num_bytes,
        layout=layout,
    )
