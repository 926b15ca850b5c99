"""From an index to what planning knows of a source."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.config.errors import UserError
from megatron_vl.data.deal import IntArray, SourceTable
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.storage.folder import AccessRule
from megatron_vl.data.storage.opening import open_folder


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A source by values that another process can open it with. `digest` is of its table."""

    name: str
    modality: str
    url: str
    access: AccessRule
    tokens_per_image: int
    digest: str

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "PlannedSource":
        """From what `asdict` made."""
        cache = saved["access"]["cache"]
        access = AccessRule(**{**saved["access"], "cache": None if cache is None else Path(cache)})
        return cls(**{**saved, "access": access})


def source_table(index: SourceIndex, modality: str, image_tokens: ImageTokens) -> SourceTable:
    """What planning knows of an index. Raises UserError where images are in a text source."""

    def read(start: int, stop: int) -> tuple[IntArray, IntArray]:
        parts = []
        for number, samples in index.ranges(start, stop):
            columns = index.columns(number)
            parts.append((columns.num_positions(image_tokens)[samples], columns.num_images[samples]))
        tokens, images = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(images)

    return SourceTable(
        name=index.name,
        modality=modality,
        num_samples=index.num_samples,
        num_images=index.num_images,
        first_samples=index.first_samples,
        read=read,
        digest=f"{index.digest}:{image_tokens.tokens_per_image}",
    )


def open_table(source: PlannedSource) -> SourceTable:
    """The table of a source that another process has opened and checked.

    Raises UserError where it is not the same any more.
    """
    index = SourceIndex(open_folder(source.url, source.access), source.name, source.access)
    table = source_table(index, source.modality, ImageTokens(tokens_per_image=source.tokens_per_image))
    if table.digest != source.digest:
        raise UserError(
            f"data.sources.{source.name}: {source.url} was indexed anew while the run was starting"
        )
    return table
