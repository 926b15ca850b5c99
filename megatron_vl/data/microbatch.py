"""What a rank computes at once, as tensors. Shapes: N images, C 3, H W pixels, S tokens of a microbatch.

Imports no torch, which takes seconds: launchers import this with what checks their data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_vl.data.types import Unit

if TYPE_CHECKING:
    import torch


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
    images_NCHW: torch.Tensor | None  # uint8, at the largest resolution; those that this rank encodes
    labels_1S: torch.Tensor | None  # int64; last stage
    loss_mask_1S: torch.Tensor | None  # float32; last stage
    failed_units: tuple[int, ...] = ()  # whose bytes did not decode (known where they were read); loss masked
    shares_images: bool = False  # images_NCHW is this rank's share of `num_images`
    features_NTC: tuple[torch.Tensor, ...] | None = None  # of all images by tower, if encoded before the pass

    @property
    def num_tokens(self) -> int:
        """Positions of the microbatch, padding included; known on every rank."""
        return int(self.cu_seqlens[-1])

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch with its tensors on `device` (itself where they are there already)."""
        if self.cu_seqlens.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Microbatch:
        """The same microbatch in page-locked memory, from where a copy to a GPU runs beside its work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Microbatch:
        import torch

        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)
