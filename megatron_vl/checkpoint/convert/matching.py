"""Which tensors of a source make which of ours, checked whole before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vl.checkpoint.convert.layouts import Layout
from megatron_vl.checkpoint.convert.weight_files import WeightFiles
from megatron_vl.checkpoint.convert.weight_map import Rule
from megatron_vl.checkpoint.streaming import Entry
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig

MAX_LISTED = 40  # names of each kind in one message


@dataclass(frozen=True)
class Source:
    """Weights in one layout."""

    files: WeightFiles
    layout: Layout


def match(source: Source, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Entry]:
    """Our tensors, by name, made of the source's: all parts that its layout has and the model wants.

    `shapes` are those of the model's parameters.

    Raises:
        UserError: listing the source's tensors that are missing, unknown or of another shape.
    """
    rules = source.layout.rules(model)
    expected = {
        name: part.shape
        for rule in rules
        for name, part in rule.without_values(shapes[rule.ours], model).items()
    }
    _check(source, expected)
    return {rule.ours: _entry(rule, source.files, model, shapes[rule.ours]) for rule in rules}


def _check(source: Source, expected: Mapping[str, torch.Size]) -> None:
    names = source.files.names()
    used = [name for name in names if not any(part in name for part in source.layout.unused)]
    problems = {
        "missing": [name for name in expected if name not in names],
        "unknown": [name for name in used if name not in expected],
        "of another shape": [
            f"{name} {_dims(source.files.info(name).shape)} (the model's is {_dims(shape)})"
            for name, shape in expected.items()
            if name in names and source.files.info(name).shape != shape
        ],
    }
    told = [f"{kind}: {_listed(found)}" for kind, found in problems.items() if found]
    if told:
        raise UserError(
            f"{source.files.source} does not fit its configuration (layout: {source.layout.name}). {'. '.join(told)}"
        )


def _entry(rule: Rule, files: WeightFiles, model: ModelConfig, shape: torch.Size) -> Entry:
    dtypes = {files.info(name).dtype for name in rule.theirs}
    if len(dtypes) > 1:
        raise UserError(f"{files.source}: {', '.join(rule.theirs)} have several dtypes; they must have one")
    return Entry(
        shape, dtypes.pop(), lambda: rule.join.to_ours([files.read(name) for name in rule.theirs], model)
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{', '.join(names[:MAX_LISTED])}{more}"


def _dims(shape: torch.Size) -> str:
    return str(list(shape))
