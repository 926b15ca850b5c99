"""Deals the units of one source to lanes, epoch by epoch.

shards ─ cut ─> chunks ─ shuffled per epoch, dealt in turn ─> lane's chunks ─ shuffled in windows ─> units

A chunk is a shard, or a range of one where shards are too few to give every lane a window of them. A unit
is a sample, or one row-long piece of a document longer than a row. Only the windows that lanes stand in are
held, as arrays; everything else follows from the key, the lane, the epoch and the position.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_vl.config.errors import UserError
from megatron_vl.data.hashing import permutation, stream_key
from megatron_vl.data.types import TEXT, Unit

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceTable:
    """What planning knows of a source: columns with one entry per sample, and where shards begin.

    Raises UserError where a source of modality text holds images.
    """

    name: str
    modality: str
    num_tokens: IntArray  # [samples] positions in a row, image tokens included
    num_images: IntArray  # [samples]
    shard_starts: IntArray  # [shards + 1] samples of shard s are shard_starts[s] : shard_starts[s + 1]
    digest: str  # of the index and of the rule that counts image tokens

    def __post_init__(self) -> None:
        if self.modality == TEXT and self.num_images.any():
            sample = int(np.flatnonzero(self.num_images)[0])
            raise UserError(
                f"data.sources.{self.name}.modality is text, but its sample {sample} holds "
                f"{self.num_images[sample]} image(s); the modality must be multimodal"
            )


@dataclass(frozen=True, kw_only=True)
class DealSettings:
    """`key` seeds the shuffles; the rest are the config's values of the same names."""

    key: int
    lanes: int
    shuffle_window: int
    sequence_length: int
    max_images_per_pack: int


def piece_range(num_tokens: int, piece: int, sequence_length: int) -> tuple[int, int]:
    """Positions [start, stop) of a document's piece: all pieces are a row long but the last."""
    start = piece * sequence_length
    return start, min(start + sequence_length, num_tokens)


class SourceDeal:
    """The units of `table` that fit a row, in each lane's order.

    Samples with images that are longer than a row or hold more images than one are left out and counted
    (`num_left_out`), as are samples without a position. Raises UserError where fewer are left than lanes.
    """

    def __init__(self, table: SourceTable, settings: DealSettings) -> None:
        self.table, self.settings = table, settings
        row, cap = settings.sequence_length, settings.max_images_per_pack
        tokens, images = table.num_tokens.astype(np.int64), table.num_images
        self._kept = np.flatnonzero((tokens > 0) & ((images == 0) | ((tokens <= row) & (images <= cap))))
        self.num_left_out = len(tokens) - len(self._kept)
        self._check_enough()
        self._num_pieces = -(-tokens[self._kept] // row)
        self._unit_starts = np.concatenate(([0], np.cumsum(self._num_pieces)))
        shard_bounds = np.unique(np.searchsorted(self._kept, table.shard_starts))  # none for emptied shards
        self._chunk_bounds = cut_shards(shard_bounds, settings.lanes * settings.shuffle_window)
        self._lane_epochs: dict[int, _LaneEpoch] = {}
        self._windows: dict[int, _Window] = {}

    @property
    def units_per_sample(self) -> Fraction:
        """The mean number of units that a sample is cut into."""
        return Fraction(int(self._unit_starts[-1]), len(self._kept))

    def num_units(self, lane: int, epoch: int) -> int:
        """How many units the lane is dealt in the epoch; at least 1."""
        return int(self._lane_epoch(lane, epoch).window_ends[-1])

    def unit(self, lane: int, epoch: int, position: int) -> Unit:
        """The lane's unit at `position` of its epoch, 0 <= position < num_units."""
        window = self._window(lane, epoch, position)
        place = position - window.start
        sample, piece = int(window.samples[place]), int(window.pieces[place])
        start, stop = piece_range(int(self.table.num_tokens[sample]), piece, self.settings.sequence_length)
        return Unit(
            source=self.table.name,
            sample=sample,
            piece=piece,
            num_tokens=stop - start,
            num_images=int(self.table.num_images[sample]),
        )

    def _check_enough(self) -> None:
        name, lanes = self.table.name, self.settings.lanes
        row, cap = self.settings.sequence_length, self.settings.max_images_per_pack
        found = (
            f"data.sources.{name}: of {len(self.table.num_tokens)} samples, {len(self._kept)} fit a row of "
            f"{row} tokens (sequence_length) and {cap} images (data.max_images_per_pack)"
        )
        if len(self._kept) == 0:
            raise UserError(f"{found}; lengthen the row, raise the cap, or leave the source out")
        if len(self._kept) < lanes:
            raise UserError(
                f"{found}, but each of the {lanes} lanes needs one; add samples, leave the source out, or "
                f"set data.lanes to at most {len(self._kept)}"
            )

    def _lane_epoch(self, lane: int, epoch: int) -> "_LaneEpoch":
        held = self._lane_epochs.get(lane)
        if held is not None and held.epoch == epoch:
            return held
        order = permutation(stream_key(self.settings.key, epoch), len(self._chunk_bounds) - 1)
        chunks = order[lane :: self.settings.lanes]
        chunk_ends = np.cumsum(
            self._unit_starts[self._chunk_bounds[chunks + 1]] - self._unit_starts[self._chunk_bounds[chunks]]
        )
        lasts = np.arange(self.settings.shuffle_window - 1, len(chunks), self.settings.shuffle_window)
        window_ends = chunk_ends[np.union1d(lasts, [len(chunks) - 1])]
        self._lane_epochs[lane] = _LaneEpoch(epoch=epoch, chunks=chunks, window_ends=window_ends)
        return self._lane_epochs[lane]

    def _window(self, lane: int, epoch: int, position: int) -> "_Window":
        held = self._windows.get(lane)
        if held is not None and held.holds(epoch, position):
            return held
        lane_epoch = self._lane_epoch(lane, epoch)
        index = int(np.searchsorted(lane_epoch.window_ends, position, side="right"))
        width = self.settings.shuffle_window
        chunks = lane_epoch.chunks[index * width : (index + 1) * width]
        rows = np.concatenate([np.arange(*self._chunk_bounds[chunk : chunk + 2]) for chunk in chunks])
        num_pieces = self._num_pieces[rows]
        first_units = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        order = permutation(stream_key(self.settings.key, epoch, lane, index), len(first_units))
        self._windows[lane] = _Window(
            epoch=epoch,
            start=int(lane_epoch.window_ends[index]) - len(order),
            samples=np.repeat(self._kept[rows], num_pieces)[order],
            pieces=(np.arange(len(first_units)) - first_units)[order],
        )
        return self._windows[lane]


def cut_shards(bounds: Int64Array, num_chunks: int) -> Int64Array:
    """Bounds of chunks from bounds of shards (both rising, from 0 to the number of samples).

    Shards stay whole if there are at least `num_chunks`; else they are cut into about equal ranges, at least
    `num_chunks` in all or one per sample.
    """
    if len(bounds) - 1 >= num_chunks:
        return bounds
    size = max(1, int(bounds[-1]) // num_chunks)
    starts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = -(-(stop - start) // size)
        starts.append(start + (stop - start) * np.arange(parts, dtype=np.int64) // parts)
    return np.concatenate([*starts, bounds[-1:]])


@dataclass(frozen=True, kw_only=True, eq=False)
class _LaneEpoch:
    """The chunks a lane is dealt in an epoch, and after how many of its units each shuffle window ends."""

    epoch: int
    chunks: Int64Array
    window_ends: Int64Array


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window:
    """The shuffled units of the window a lane stands in; `start` is the position of the first."""

    epoch: int
    start: int
    samples: Int64Array
    pieces: Int64Array

    def holds(self, epoch: int, position: int) -> bool:
        return epoch == self.epoch and self.start <= position < self.start + len(self.samples)
