"""Weights of other projects into a checkpoint that training starts from (`checkpoint.initial`).

One tensor at a time is in memory: reading is mapped, and writing asks for a tensor when it is its turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.checkpoint.convert.aside import whole_folder
from megatron_vl.checkpoint.convert.layouts import (
    LANGUAGE_MODELS,
    SAM_MODELS,
    SIGLIP_MODELS,
    WHOLE_MODELS,
    layout_of,
)
from megatron_vl.checkpoint.convert.matching import Source, match
from megatron_vl.checkpoint.convert.progress import shown
from megatron_vl.checkpoint.convert.source_config import IMAGE_TOKEN_ID, read_source_model
from megatron_vl.checkpoint.convert.tokenizer_files import SourceTokens, add_image_token, read_source_tokens
from megatron_vl.checkpoint.convert.weight_files import WeightFiles
from megatron_vl.checkpoint.description import Description, write_description
from megatron_vl.checkpoint.manifest import seal
from megatron_vl.checkpoint.streaming import Entry, write_tensors
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.model.encoders import vision_initializers
from megatron_vl.model.initialize import generator
from megatron_vl.model.shapes import parameter_shapes, vision_without_values

PART_LAYOUTS = {"language": LANGUAGE_MODELS, "siglip": SIGLIP_MODELS, "sam": SAM_MODELS}
VOCABULARY = ("stage_zero.embedding.weight", "language.head.weight")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written, and what the user should know."""

    model: ModelConfig
    num_parameters: int
    num_bytes: int
    notices: list[str]


def import_model(folder: Path, output: Path, vocab_size: int | None = None) -> Imported:
    """A whole DeepSeek-VL in the layout of transformers or the official one.

    `vocab_size` pads the vocabulary: the new rows are the mean of the others.

    Raises:
        UserError: naming what does not fit; nothing is written then.
    """
    source = read_source_model(folder)
    files = WeightFiles(folder)
    layout = layout_of(files.names(), WHOLE_MODELS, str(folder))
    entries = match(Source(files, layout), source.model, parameter_shapes(source.model))
    tokens = read_source_tokens(folder, source.image_token_id)
    return _write(output, source.model, entries, tokens, folder, vocab_size)


def import_parts(
    folders: Mapping[str, Path], model: ModelConfig, seed: int, output: Path, vocab_size: int | None = None
) -> Imported:
    """A text-only language model and vision towers of their own become one model: how stage 1 starts (paper,
    section 3.2.1).

    `folders` says where language, siglip and sam are. What no source has (adaptor, SAM's downsampling) is drawn
    as in a fresh run of this seed; SAM's HD branch gets a copy of its neck, at alpha 0, as the official code does.
    """
    shapes = parameter_shapes(model)
    entries: dict[str, Entry] = {}
    for part, folder in folders.items():
        files = WeightFiles(folder)
        source = Source(files, layout_of(files.names(), PART_LAYOUTS[part], str(folder)))
        entries |= match(source, model, shapes)
    fresh = [name for name in shapes if name not in entries]
    entries |= _fresh_entries(fresh, model, seed, entries[VOCABULARY[0]].dtype)
    entries |= {name: entries[name.replace(".neck_hd.", ".neck.")] for name in fresh if ".neck_hd." in name}
    tokens = read_source_tokens(folders["language"], None)
    return _write(output, model, entries, tokens, folders["language"], vocab_size)


def _fresh_entries(names: list[str], model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Entry]:
    module = vision_without_values(model)
    draws = vision_initializers(module, lambda name: generator(seed, f"stage_zero.{name}"))
    parameters = dict(module.named_parameters())

    def entry(name: str) -> Entry:
        return Entry(parameters[name].shape, dtype, lambda: draws[name]().to(dtype))

    return {name: entry(name.removeprefix("stage_zero.")) for name in names}


def _write(
    output: Path,
    model: ModelConfig,
    entries: dict[str, Entry],
    tokens: SourceTokens,
    folder: Path,
    vocab_size: int | None,
) -> Imported:
    notices = list(tokens.notices)
    rows = model.language.vocab_size
    if vocab_size is not None and vocab_size != rows:
        if vocab_size < rows:
            raise UserError(
                f"vocab_size={vocab_size}: must be at least {rows}, the vocabulary of the weights"
            )
        entries = entries | {name: _padded(entries[name], vocab_size) for name in VOCABULARY}
        model = replace(model, language=replace(model.language, vocab_size=vocab_size))
        notices.append(
            f"the vocabulary was padded from {rows} to {vocab_size}; new rows are the mean of the others"
        )
    image_token_id = IMAGE_TOKEN_ID if tokens.image_token_id is None else tokens.image_token_id
    _check_vocabulary(model.language.vocab_size, tokens, folder)
    if image_token_id >= model.language.vocab_size:
        notices.append(
            f"warning: the image token's id {image_token_id} is outside the vocabulary of "
            f"{model.language.vocab_size}; it is kept, but no sequence with images can be embedded"
        )
    description = Description(model=model, image_token_id=image_token_id, tokens=tokens.tokens)
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    with whole_folder(output, num_bytes) as aside:
        with shown(entries, "importing") as watched:
            write_tensors(aside, watched)
        write_description(aside, description, folder)
        add_image_token(aside, tokens)
        seal(aside, {})
    return Imported(
        model=model,
        num_parameters=sum(entry.shape.numel() for entry in entries.values()),
        num_bytes=num_bytes,
        notices=notices,
    )


def _check_vocabulary(vocab_size: int, tokens: SourceTokens, folder: Path) -> None:
    if tokens.num_entries > vocab_size:
        padded = -(-tokens.num_entries // 128) * 128
        raise UserError(
            f"{folder}: the tokenizer has {tokens.num_entries} entries, the weights a vocabulary of {vocab_size}; "
            f"pad it with vocab_size={padded} (at least {tokens.num_entries})"
        )


def _padded(entry: Entry, num_rows: int) -> Entry:
    def read() -> Tensor:
        rows = entry.read()
        mean = rows.mean(0, keepdim=True, dtype=torch.float32).to(rows.dtype)
        return torch.cat([rows, mean.expand(num_rows - len(rows), -1)])

    return Entry(torch.Size([num_rows, entry.shape[1]]), entry.dtype, read)
