"""Deals the units of one source to lanes, epoch by epoch.

shards ─ cut ─> chunks ─ shuffled per epoch, dealt in turn ─> lane's chunks ─ shuffled in windows ─> units

A chunk is a shard, or a range of one where shards are too few to give every lane a window of them. A unit
is a sample, or one row-long piece of a document longer than a row. Only the windows that lanes stand in are
read and held; everything else follows from the key, the lane, the epoch and the window. So memory depends on the
number of lanes and the size of a window, not on the size of the source.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vl.config.errors import UserError
from megatron_vl.data.hashing import permutation, shuffled, stream_key
from megatron_vl.data.plan_state import Cursor
from megatron_vl.data.types import TEXT, Unit

IntArray = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]

MAX_EMPTY_EPOCHS = 3  # of a lane, one after the other


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceTable:
    """What planning knows of a source: where its shards begin, and a way to its columns.

    first_samples: [shards], rising from 0; may be a view of a mapped file.
    read: gives the positions in a row, image tokens included, and the images of samples start to stop, [stop - start]
        each.
    digest: of the index and of the rule that counts image tokens.

    Raises UserError where a source of modality text holds images.
    """

    name: str
    modality: str
    num_samples: int
    num_images: int
    first_samples: IntArray
    read: Callable[[int, int], tuple[IntArray, IntArray]]
    digest: str

    def __post_init__(self) -> None:
        if self.modality == TEXT and self.num_images:
            raise UserError(
                f"data.sources.{self.name}.modality is text, but its samples hold {self.num_images} image(s); the "
                "modality must be multimodal"
            )


@dataclass(frozen=True, kw_only=True)
class DealSettings:
    """`key` seeds the shuffles; the rest are the config's values of the same names."""

    key: int
    lanes: int
    shuffle_window: int
    sequence_length: int
    max_images_per_pack: int


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """A unit, of how many pieces its sample has, where the lane stands after it, and how many samples it left out
    on the way: those that no row can hold."""

    unit: Unit
    num_pieces: int
    cursor: Cursor
    num_left_out: int


class SourceDeal:
    """The units of `table` that fit a row, in each lane's order.

    Samples with images that are longer than a row or hold more images than one are left out, as are samples
    without a position. Raises UserError where there are fewer samples than lanes.
    """

    def __init__(self, table: SourceTable, settings: DealSettings) -> None:
        self.table, self.settings = table, settings
        if table.num_samples < settings.lanes:
            raise UserError(
                f"data.sources.{table.name} has {table.num_samples} samples, but each of the {settings.lanes} lanes "
                f"needs one; add samples, leave the source out, or set data.lanes to at most {table.num_samples}"
            )
        num_chunks = settings.lanes * settings.shuffle_window
        self._cuts: Int64Array | None = None  # bounds of chunks, where shards are cut
        self._num_chunks = len(table.first_samples)
        if self._num_chunks < num_chunks:
            self._cuts = cut_shards(
                np.append(table.first_samples, table.num_samples).astype(np.int64), num_chunks
            )
            self._num_chunks = len(self._cuts) - 1
        self._windows: dict[int, tuple[Cursor, _Window]] = {}  # by lane; the cursor's position is 0

    def next(self, lane: int, cursor: Cursor, max_epochs: int | None) -> Dealt | None:
        """The unit at or after `cursor`; None where the lane has seen `max_epochs` epochs.

        Raises UserError where there is none in MAX_EMPTY_EPOCHS epochs.
        """
        begun, num_left_out = cursor.epoch, 0
        while max_epochs is None or cursor.epoch < max_epochs:
            window = self._window(lane, cursor)
            if cursor.position == 0:
                num_left_out += window.num_left_out
            if cursor.position < len(window.samples):
                unit, num_pieces = window.unit(self.table.name, cursor.position)
                after = cursor._replace(position=cursor.position + 1)
                if after.position == len(window.samples):
                    after = self._next_window(lane, cursor)
                return Dealt(unit=unit, num_pieces=num_pieces, cursor=after, num_left_out=num_left_out)
            cursor = self._next_window(lane, cursor)
            if cursor.epoch - begun > MAX_EMPTY_EPOCHS:
                raise UserError(
                    f"data.sources.{self.table.name}: of {num_left_out} samples dealt to lane {lane}, none fits a row "
                    f"of {self.settings.sequence_length} tokens (sequence_length) and "
                    f"{self.settings.max_images_per_pack} images (data.max_images_per_pack); lengthen the row, raise "
                    "the cap, or leave the source out"
                )
        return None

    def _next_window(self, lane: int, cursor: Cursor) -> Cursor:
        num_chunks = len(range(lane, self._num_chunks, self.settings.lanes))
        num_windows = -(-num_chunks // self.settings.shuffle_window)
        if cursor.window + 1 < num_windows:
            return Cursor(cursor.epoch, cursor.window + 1, 0)
        return Cursor(cursor.epoch + 1, 0, 0)

    def _window(self, lane: int, cursor: Cursor) -> "_Window":
        start = cursor._replace(position=0)
        held = self._windows.get(lane)
        if held is None or held[0] != start:
            held = self._windows[lane] = start, self._read(lane, start)
        return held[1]

    def _read(self, lane: int, cursor: Cursor) -> "_Window":
        settings = self.settings
        first = lane + cursor.window * settings.shuffle_window * settings.lanes
        stop = min(first + settings.shuffle_window * settings.lanes, self._num_chunks)
        places = np.arange(first, stop, settings.lanes, dtype=np.int64)
        chunks = shuffled(stream_key(settings.key, cursor.epoch), self._num_chunks, places)
        ranges = [self._chunk_range(chunk) for chunk in chunks.tolist()]
        columns = [self.table.read(*bounds) for bounds in ranges]
        samples = np.concatenate([np.arange(*bounds, dtype=np.int64) for bounds in ranges])
        tokens, images = (np.concatenate(parts).astype(np.int64) for parts in zip(*columns, strict=True))
        return _shuffle(
            samples, tokens, images, settings, stream_key(settings.key, cursor.epoch, lane, cursor.window)
        )

    def _chunk_range(self, chunk: int) -> tuple[int, int]:
        if self._cuts is not None:
            return int(self._cuts[chunk]), int(self._cuts[chunk + 1])
        starts = self.table.first_samples
        stop = starts[chunk + 1] if chunk + 1 < len(starts) else self.table.num_samples
        return int(starts[chunk]), int(stop)


def cut_shards(bounds: Int64Array, num_chunks: int) -> Int64Array:
    """Bounds of chunks from bounds of shards (both rising, from 0 to the number of samples).

    Shards are cut into about equal ranges, at least `num_chunks` in all or one per sample.
    """
    size = max(1, int(bounds[-1]) // num_chunks)
    starts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = -(-(stop - start) // size)
        starts.append(start + (stop - start) * np.arange(parts, dtype=np.int64) // parts)
    return np.concatenate([*starts, bounds[-1:]])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window:
    """The shuffled units of one of a lane's windows, as lists: they are taken one by one."""

    samples: list[int]
    pieces: list[int]
    num_tokens: list[int]  # of the piece
    num_images: list[int]
    num_pieces: list[int]  # of the sample
    num_left_out: int

    def unit(self, source: str, position: int) -> tuple[Unit, int]:
        unit = Unit(
            source,
            self.samples[position],
            self.pieces[position],
            self.num_tokens[position],
            self.num_images[position],
        )
        return unit, self.num_pieces[position]


def _shuffle(
    samples: Int64Array, tokens: Int64Array, images: Int64Array, settings: DealSettings, key: int
) -> _Window:
    row, cap = settings.sequence_length, settings.max_images_per_pack
    kept = (tokens > 0) & ((images == 0) | ((tokens <= row) & (images <= cap)))
    samples, tokens, images = samples[kept], tokens[kept], images[kept]
    num_pieces = -(-tokens // row)
    first_units = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    pieces = np.arange(len(first_units)) - first_units
    order = permutation(key, len(pieces))
    repeated = [np.repeat(column, num_pieces)[order] for column in (samples, tokens, images, num_pieces)]
    pieces = pieces[order]
    return _Window(
        samples=repeated[0].tolist(),
        pieces=pieces.tolist(),
        num_tokens=np.minimum(repeated[1] - pieces * row, row).tolist(),
        num_images=repeated[2].tolist(),
        num_pieces=repeated[3].tolist(),
        num_left_out=len(kept) - int(kept.sum()),
    )
