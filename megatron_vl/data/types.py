"""The values that rooms exchange about plans. No torch: whoever plans needs none."""

from dataclasses import dataclass
from typing import NamedTuple

TEXT, MULTIMODAL = "text", "multimodal"
MIXED = "mixed"  # a step with rows of both


class Unit(NamedTuple):
    """What is packed: a sample, or piece `piece` of a text-only document longer than a row.

    `num_tokens` counts positions in the row: begin-of-sentence + text + image tokens of this piece.
    """

    source: str
    sample: int  # row in the source's index
    piece: int
    num_tokens: int
    num_images: int


@dataclass(frozen=True)
class Pack:
    """The units of one row, in order; their tokens fit the stage's sequence length."""

    units: tuple[Unit, ...]

    @property
    def num_tokens(self) -> int:
        return sum(unit.num_tokens for unit in self.units)

    @property
    def num_images(self) -> int:
        return sum(unit.num_images for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One data-parallel rank's share of one global batch: its rows in the order of its microbatches.

    `digest` (52 bits, exact in fp64) is over the rows of all ranks of this one's `group`, so it is equal on all of
    them.
    """

    step: int  # from 1 within the stage
    modality: str  # TEXT, MULTIMODAL or MIXED, the same on every rank
    text_ratio: float  # scheduled p(t)
    text_share: float  # of the rows of this step
    packs: tuple[Pack, ...]
    group: int  # of data-parallel ranks that deal rows among themselves: their first one
    digest: int
