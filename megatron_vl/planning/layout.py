"""Pipeline layouts: which pipeline chunk holds stage zero, which decoder layers, which the head.

Strings are megatron-core's: E stage zero, t a decoder layer, L head and loss, `|` between chunks, `x*n` and
`(x)*n` repeat, commas are cosmetic. Chunk c runs on pipeline rank c mod pipeline_size.
"""

import re

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import LanguageConfig
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.planning.topology import Topology, check_tensor_size


def divide(language: LanguageConfig, parallel: ParallelConfig, world_size: int) -> tuple[Topology, str]:
    """How a model is divided over `world_size` ranks: the grid, and the layout that `resolve_layout` gives.

    Raises:
        UserError: the ranks, the model's sizes or its layers do not divide so.
    """
    topology = grid_of(language, parallel, world_size)
    return topology, resolve_layout(parallel.layout, language.num_layers, topology)


def grid_of(language: LanguageConfig, parallel: ParallelConfig, world_size: int) -> Topology:
    """The grid alone. Raises UserError where the ranks or the model's sizes do not divide so."""
    topology = Topology(
        world_size=world_size,
        tensor_size=parallel.tensor_size,
        pipeline_size=parallel.pipeline_size,
        virtual_size=parallel.virtual_size,
    )
    check_tensor_size(language, parallel.tensor_size, parallel.sequence_parallel)
    return topology


def resolve_layout(layout: str | None, num_layers: int, topology: Topology) -> str:
    """The layout string to hand to megatron-core, checked; null gives an even split.

    Raises:
        UserError: the layout names another number of chunks, loses or repeats layers, or misplaces E or L.
    """
    if layout is None:
        return even_layout(num_layers, topology)
    if layout == "auto":
        raise UserError(
            "parallel.layout=auto is for training, which plans its stages; give a layout here, or null"
        )
    chunks = parse_layout(layout)
    if len(chunks) != topology.num_chunks:
        raise UserError(
            f"parallel.layout={layout!r} has {len(chunks)} chunks; parallel.pipeline_size="
            f"{topology.pipeline_size} x parallel.virtual_size={topology.virtual_size} needs "
            f"{topology.num_chunks}, such as {even_layout(num_layers, topology)!r}"
        )
    flat = "".join(chunks)
    if flat != "E" + "t" * num_layers + "L":
        raise UserError(
            f"parallel.layout={layout!r} holds {flat.count('E')} E, {flat.count('t')} t and {flat.count('L')} L; "
            f"needed are one E first, {num_layers} t (model.language.num_layers) and one L last, such as "
            f"{even_layout(num_layers, topology)!r}"
        )
    return "|".join(chunks)


def even_layout(num_layers: int, topology: Topology) -> str:
    """Layers divided as evenly as they go; what remains goes to the middle, away from stage zero and the head.

    Raises:
        UserError: fewer layers than pipeline chunks.
    """
    num_chunks = topology.num_chunks
    if num_layers < num_chunks:
        raise UserError(
            f"model.language.num_layers={num_layers} cannot fill parallel.pipeline_size="
            f"{topology.pipeline_size} x parallel.virtual_size={topology.virtual_size} = {num_chunks} chunks "
            f"with a layer each; lower the sizes, or give parallel.layout with empty chunks"
        )
    base, rest = divmod(num_layers, num_chunks)
    start = (num_chunks - rest + 1) // 2
    counts = [base + (start <= chunk < start + rest) for chunk in range(num_chunks)]
    chunks = ["t" * count for count in counts]
    return "|".join(["E" + chunks[0], *chunks[1:]]) + "L"


def parse_layout(layout: str) -> list[str]:
    """Expand a layout string into one string of E, t, L per chunk.

    Raises:
        UserError: a character that is none of E, t, L, |, or a repetition.
    """
    text = layout.replace(",", "").replace(" ", "")
    text = re.sub(r"\(([^()]+)\)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    text = re.sub(r"(.)\*(\d+)", lambda match: match[1] * int(match[2]), text)
    unknown = sorted(set(text) - set("EtL|"))
    if unknown:
        raise UserError(
            f"parallel.layout={layout!r}: unknown {' '.join(unknown)}; known are E (stage zero), t (a decoder "
            f"layer), L (head and loss), | between chunks, and x*n or (x)*n to repeat"
        )
    return text.split("|")
