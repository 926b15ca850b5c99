"""The values that rooms exchange about data. Shapes: N images, C 3, H W pixels, S tokens of a microbatch."""

from dataclasses import dataclass, replace
from typing import Any

import torch

TEXT, MULTIMODAL = "text", "multimodal"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is packed: a sample, or piece `piece` of a text-only document longer than a row.

    `num_tokens` counts positions in the row: begin-of-sentence + text + image tokens of this piece.
    """

    source: str
    sample: int  # row in the source's index
    piece: int
    num_tokens: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
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
    """This rank's share of one global batch: its rows in order (lane by lane), and what the step is."""

    step: int  # from 1 within the stage
    modality: str  # TEXT or MULTIMODAL, the same on every rank
    text_ratio: float  # scheduled p(t)
    packs: tuple[Pack, ...]
    digest: int  # 63 bits over modality and packs; equal on ranks that share a data-parallel rank


@dataclass(kw_only=True)
class Microbatch:
    """`micro_batch_size` rows concatenated. Every rank knows the shapes; tensors it has no use for are None.

    A row ends with a padding segment where it is not full, so `cu_seqlens[-1] == S`. Labels are the next tokens;
    `loss_mask` is 1 where the label is supervised language, 0 elsewhere (image positions, padding, prompts).
    """

    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    max_seqlen: int  # the longest segment
    num_images: int
    units: tuple[Unit, ...]  # segment i holds units[i] for unpadded rows; see segment_units
    segment_units: tuple[int, ...]  # per segment: index into units, or -1 for padding
    tokens_1S: torch.Tensor | None  # int64; on the first pipeline stage
    images_NCHW: torch.Tensor | None  # uint8, at the largest resolution of the encoders; first stage
    labels_1S: torch.Tensor | None  # int64; last stage
    loss_mask_1S: torch.Tensor | None  # float32; last stage
    failed_units: tuple[int, ...] = ()  # whose bytes did not decode (known where they were read); loss masked

    @property
    def num_tokens(self) -> int:
        """Positions of the microbatch, padding included; known on every rank."""
        return int(self.cu_seqlens[-1])

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with its tensors on `device` (itself where they are there already)."""
        if self.cu_seqlens.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)
