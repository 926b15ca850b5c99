"""From the packs of a microbatch and what its samples hold to tensors.

A packing stage has rows of a fixed length; each ends with a padding segment where it is not full. Elsewhere a
row is one unit, rows follow each other, and one padding segment at the end fills the microbatch's length.

T positions of a unit, S of a microbatch, N images, C 3, H W pixels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.text import EncodedSample
from megatron_vl.data.types import Pack, Unit

PADDING = -1  # in Microbatch.segment_units


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """How a stage's packs become microbatches. `sequence_length` also is where long documents are cut.

    `pad_multiple`: what the length of a microbatch without fixed rows must divide by.
    """

    sequence_length: int
    packing: bool
    micro_batch_size: int
    pad_multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class UnitTokens:
    """What a unit puts into its row: inputs, labels (int64 [T]), and which labels carry loss (bool [T])."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where units and padding lie in a microbatch, as every rank knows it without reading data."""

    units: tuple[Unit, ...]
    segment_lengths: tuple[int, ...]
    segment_units: tuple[int, ...]  # per segment an index into units, or PADDING

    @property
    def num_images(self) -> int:
        return sum(unit.num_images for unit in self.units)


def split_packs(packs: Sequence[Pack], rule: RowRule) -> list[tuple[Pack, ...]]:
    """A rank's packs as microbatches. Raises ValueError where they do not divide."""
    size = rule.micro_batch_size
    if len(packs) % size:
        raise ValueError(f"{len(packs)} rows do not divide into microbatches of {size}")
    return [tuple(packs[start : start + size]) for start in range(0, len(packs), size)]


def microbatch_length(microbatches: Sequence[Sequence[Pack]], rule: RowRule) -> int:
    """S, the same for all microbatches of a rank's step: pipeline stages exchange tensors of one shape."""
    if rule.packing:
        return rule.sequence_length * rule.micro_batch_size
    longest = max(sum(pack.num_tokens for pack in packs) for packs in microbatches)
    return -(-longest // rule.pad_multiple) * rule.pad_multiple


def lay_out(packs: Sequence[Pack], rule: RowRule, length: int) -> Layout:
    """The segments of a microbatch of `length` positions. Raises ValueError where a row is too long."""
    lengths: list[int] = []
    indices: list[int] = []
    units: list[Unit] = []
    for position, pack in enumerate(packs):
        for unit in pack.units:
            lengths.append(unit.num_tokens)
            indices.append(len(units))
            units.append(unit)
        is_last = position == len(packs) - 1
        if not (rule.packing or is_last):
            continue
        row_end = (position + 1) * rule.sequence_length if rule.packing else length
        padding = row_end - sum(lengths)
        if padding < 0:
            raise ValueError(f"row {position} ends at {sum(lengths)}, beyond {row_end}")
        if padding > 0:
            lengths.append(padding)
            indices.append(PADDING)
    return Layout(units=tuple(units), segment_lengths=tuple(lengths), segment_units=tuple(indices))


def cut_unit(encoded: EncodedSample, piece: int, sequence_length: int) -> UnitTokens:
    """Piece `piece` of a sample: inputs are all tokens but the last, labels all but the first.

    Pieces share no label, and each label belongs to one.
    """
    here = slice(piece * sequence_length, (piece + 1) * sequence_length)
    return UnitTokens(
        inputs=encoded.tokens[:-1][here],
        labels=encoded.tokens[1:][here],
        loss_mask=encoded.supervised[1:][here],
    )


def blank_unit(num_tokens: int, num_image_tokens: int, *, image_id: int, filler_id: int) -> UnitTokens:
    """In place of a unit whose text cannot be read: the image tokens that its images need, and no loss.

    Raises ValueError where they are more than the unit's positions.
    """
    if num_image_tokens > num_tokens:
        raise ValueError(f"a unit of {num_tokens} positions has no room for {num_image_tokens} image tokens")
    inputs = np.full(num_tokens, filler_id, dtype=np.int64)
    inputs[:num_image_tokens] = image_id
    labels = np.full(num_tokens, filler_id, dtype=np.int64)
    return UnitTokens(inputs=inputs, labels=labels, loss_mask=np.zeros(num_tokens, dtype=np.bool_))


def assemble(
    layout: Layout,
    tokens: Sequence[UnitTokens] | None,
    images_NCHW: NDArray[np.uint8] | None,
    *,
    with_inputs: bool,
    with_labels: bool,
    filler_id: int,
) -> Microbatch:
    """The microbatch of a layout. `tokens` has one entry per unit, or is None where none are read.

    Padding is `filler_id`. Raises ValueError where a unit's tokens are not as many as its segment is long.
    """
    import torch  # seconds to import, and a launcher only checks what there is to load

    lengths = np.array(layout.segment_lengths, dtype=np.int64)
    inputs_1S = labels_1S = loss_mask_1S = None
    if tokens is not None:
        segments = [
            blank_unit(length, 0, image_id=filler_id, filler_id=filler_id)
            if index == PADDING
            else tokens[index]
            for length, index in zip(layout.segment_lengths, layout.segment_units, strict=True)
        ]
        found = [len(segment.inputs) for segment in segments]
        if found != list(layout.segment_lengths):
            raise ValueError(f"segments hold {found} tokens, the plan says {list(layout.segment_lengths)}")
        if with_inputs:
            inputs_1S = torch.from_numpy(np.concatenate([segment.inputs for segment in segments]))[None]
        if with_labels:
            labels_1S = torch.from_numpy(np.concatenate([segment.labels for segment in segments]))[None]
            mask = np.concatenate([segment.loss_mask for segment in segments])
            loss_mask_1S = torch.from_numpy(mask.astype(np.float32))[None]
    return Microbatch(
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_images=layout.num_images,
        units=layout.units,
        segment_units=layout.segment_units,
        tokens_1S=inputs_1S,
        images_NCHW=None if images_NCHW is None else torch.from_numpy(images_NCHW),
        labels_1S=labels_1S,
        loss_mask_1S=loss_mask_1S,
    )


def mask_failed(microbatch: Microbatch, failed_units: Collection[int]) -> Microbatch:
    """The microbatch without the loss of `failed_units` (indices into its units), which are noted in it."""
    loss_mask_1S = microbatch.loss_mask_1S
    failed = sorted({*microbatch.failed_units, *failed_units})
    if loss_mask_1S is not None and failed:
        loss_mask_1S = loss_mask_1S.clone()
        bounds = microbatch.cu_seqlens.tolist()
        for segment, unit in enumerate(microbatch.segment_units):
            if unit in failed:
                loss_mask_1S[:, bounds[segment] : bounds[segment + 1]] = 0
    return replace(microbatch, loss_mask_1S=loss_mask_1S, failed_units=tuple(failed))
