"""A checkpoint into a folder that transformers loads unchanged."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_vl.checkpoint.convert.aside import whole_folder
from megatron_vl.checkpoint.convert.layouts import TRANSFORMERS
from megatron_vl.checkpoint.convert.progress import shown
from megatron_vl.checkpoint.convert.source_config import CONFIG_FILE
from megatron_vl.checkpoint.convert.target_config import check_exportable, model_config, write_companions
from megatron_vl.checkpoint.convert.weight_files import write_safetensors
from megatron_vl.checkpoint.convert.weight_map import Rule
from megatron_vl.checkpoint.description import read_description
from megatron_vl.checkpoint.streaming import Entry, read_tensors
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.model.shapes import parameter_shapes


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what the user should know."""

    num_tensors: int
    num_bytes: int
    notices: list[str]


def export_model(checkpoint: Path, output: Path) -> Exported:
    """Write weights (safetensors, in the dtype of the checkpoint), configuration, tokenizer and processor files.

    Raises:
        UserError: the checkpoint is broken, or transformers has no such model; nothing is written then.
    """
    description = read_description(checkpoint)
    model = description.model
    check_exportable(model)
    entries = read_tensors(checkpoint)
    _check_complete(checkpoint, entries, model)
    rules = TRANSFORMERS.rules(model)
    sizes = _sizes(rules, entries, model)
    with whole_folder(output, sum(sizes.values())) as aside:
        with shown({rule.ours: entries[rule.ours] for rule in rules}, "exporting") as watched:
            write_safetensors(aside, _their_tensors(rules, watched, model), sizes)
        dtype = entries["stage_zero.embedding.weight"].dtype
        config = json.dumps(model_config(description, dtype), indent=2) + "\n"
        (aside / CONFIG_FILE).write_text(config, encoding="utf-8")
        has_tokenizer = write_companions(checkpoint, aside, description)
    notices = [] if has_tokenizer else [f"{checkpoint} has no tokenizer: the model is exported alone"]
    return Exported(num_tensors=len(sizes), num_bytes=sum(sizes.values()), notices=notices)


def _check_complete(checkpoint: Path, entries: dict[str, Entry], model: ModelConfig) -> None:
    shapes = parameter_shapes(model)
    wrong = [name for name, shape in shapes.items() if name not in entries or entries[name].shape != shape]
    if wrong:
        raise UserError(f"{checkpoint} does not hold what its model.json says: {', '.join(wrong[:20])}")


def _sizes(rules: list[Rule], entries: dict[str, Entry], model: ModelConfig) -> dict[str, int]:
    """Bytes of each tensor of theirs, in the order in which `_their_tensors` makes them."""
    return {
        name: part.nbytes
        for rule in rules
        for name, part in rule.without_values(
            entries[rule.ours].shape, model, entries[rule.ours].dtype
        ).items()
    }


def _their_tensors(
    rules: list[Rule], entries: dict[str, Entry], model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        yield from zip(rule.theirs, rule.join.to_theirs(entries[rule.ours].read(), model), strict=True)
