"""Every epoch deals each unit of a source to one lane, once; lanes shuffle it in windows."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.deal import DealSettings, SourceDeal, SourceTable, cut_shards
from megatron_vl.data.plan_state import Cursor
from megatron_vl.data.types import MULTIMODAL, TEXT, Unit

ROW, CAP = 100, 3


class CountingTable:
    """Columns in memory, and which samples were read of them."""

    def __init__(self, num_tokens: list[int], num_images: list[int]) -> None:
        self.tokens, self.images = np.array(num_tokens, dtype=np.int32), np.array(num_images, dtype=np.int32)
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append((start, stop))
        return self.tokens[start:stop], self.images[start:stop]


def table(
    num_tokens: list[int], num_images: list[int] | None = None, first_samples: list[int] | None = None
) -> SourceTable:
    columns = CountingTable(num_tokens, num_images or [0] * len(num_tokens))
    return SourceTable(
        name="pages",
        modality=MULTIMODAL if columns.images.any() else TEXT,
        num_samples=len(num_tokens),
        num_images=int(columns.images.sum()),
        first_samples=np.array(first_samples or [0]),
        read=columns.read,
        digest="0",
    )


def settings(lanes: int, shuffle_window: int = 2, key: int = 7) -> DealSettings:
    return DealSettings(
        key=key, lanes=lanes, shuffle_window=shuffle_window, sequence_length=ROW, max_images_per_pack=CAP
    )


def lane_epoch(deal: SourceDeal, lane: int, epoch: int) -> tuple[list[Unit], int]:
    """A lane's units of an epoch, and how many samples it left out."""
    units, num_left_out, cursor = [], 0, Cursor(epoch, 0, 0)
    while (dealt := deal.next(lane, cursor, epoch + 1)) is not None:
        units.append(dealt.unit)
        num_left_out, cursor = num_left_out + dealt.num_left_out, dealt.cursor
    return units, num_left_out


@st.composite
def deals(draw: st.DrawFn) -> SourceDeal:
    """Sources of short and long documents, samples that fit no row, and shards of any size."""
    num_samples = draw(st.integers(1, 60))
    tokens = draw(st.lists(st.integers(0, 4 * ROW), min_size=num_samples, max_size=num_samples))
    images = draw(st.lists(st.integers(0, CAP + 1), min_size=num_samples, max_size=num_samples))
    cuts = draw(st.sets(st.integers(1, num_samples), max_size=12)) - {num_samples}
    source = table(tokens, images, [0, *sorted(cuts)])
    lanes, window = draw(st.integers(1, num_samples)), draw(st.integers(1, 4))
    return SourceDeal(source, settings(lanes, window, key=draw(st.integers(0, 9))))


def piece_counts(source: SourceTable) -> np.ndarray:
    """Units per sample, from the definition."""
    tokens, images = source.read(0, source.num_samples)
    whole = (images > 0) & (images <= CAP) & (tokens <= ROW)
    return np.where(images == 0, np.ceil(tokens / ROW), whole & (tokens > 0)).astype(int)


@given(deal=deals(), epoch=st.integers(0, 3))
def test_every_unit_is_dealt_once_per_epoch(deal: SourceDeal, epoch: int) -> None:
    counts = piece_counts(deal.table)
    expected = {(sample, piece): num for sample, num in enumerate(counts) for piece in range(num)}
    dealt, num_left_out = Counter(), 0
    for lane in range(deal.settings.lanes):
        units, left_out = lane_epoch(deal, lane, epoch)
        dealt.update((unit.sample, unit.piece) for unit in units)
        num_left_out += left_out
    assert dealt == Counter(expected.keys())
    # What a lane leaves out after its last unit of the epoch, it meets with the next one.
    assert num_left_out <= int((counts == 0).sum())


@given(deal=deals())
def test_units_fit_a_row_and_pieces_make_up_their_document(deal: SourceDeal) -> None:
    lengths: Counter[int] = Counter()
    tokens, images = deal.table.read(0, deal.table.num_samples)
    for lane in range(deal.settings.lanes):
        for unit in lane_epoch(deal, lane, 0)[0]:
            assert 0 < unit.num_tokens <= ROW
            assert unit.num_images == images[unit.sample] <= CAP
            lengths[unit.sample] += unit.num_tokens
    assert all(length == tokens[sample] for sample, length in lengths.items())


@given(deal=deals(), data=st.data())
def test_a_unit_does_not_depend_on_what_was_asked_before(deal: SourceDeal, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, deal.settings.lanes - 1))
    cursors, expected, cursor = [], [], Cursor(0, 0, 0)
    while (dealt := deal.next(lane, cursor, 2)) is not None:
        cursors.append(cursor)
        expected.append(dealt)
        cursor = dealt.cursor
    if expected:
        place = data.draw(st.integers(0, len(expected) - 1))
        assert SourceDeal(deal.table, deal.settings).next(lane, cursors[place], 2) == expected[place]


def test_all_samples_of_an_epoch_reach_ten_thousand_ranks_once() -> None:
    """Each of 10,000 lanes belongs to a rank of its own, which reads its own shards and no others."""
    num_shards, shard, lanes = 30_011, 5, 10_000
    columns = CountingTable([10] * num_shards * shard, [0] * num_shards * shard)
    source = replace(table([1]), num_samples=num_shards * shard, first_samples=np.arange(num_shards) * shard)
    deal = SourceDeal(replace(source, read=columns.read), settings(lanes))
    seen = np.zeros(source.num_samples, dtype=int)
    for lane in range(lanes):
        columns.reads.clear()
        units, _ = lane_epoch(deal, lane, 1)
        np.add.at(seen, [unit.sample for unit in units], 1)
        assert sum(stop - start for start, stop in columns.reads) == len(units)
    assert (seen == 1).all()


def test_memory_does_not_depend_on_the_number_of_shards() -> None:
    """A lane reads the window that it stands in, however many shards there are, and nothing before it."""
    for num_shards in (1_000, 1_000_000):
        source = replace(table([1]), num_samples=num_shards * 10, first_samples=np.arange(num_shards) * 10)
        reads: list[tuple[int, int]] = []

        def read(
            start: int, stop: int, reads: list[tuple[int, int]] = reads
        ) -> tuple[np.ndarray, np.ndarray]:
            reads.append((start, stop))
            return np.full(stop - start, 10), np.zeros(stop - start, dtype=int)

        deal = SourceDeal(replace(source, read=read), settings(lanes=64, shuffle_window=3))
        cursor = Cursor(5, 2, 7)
        for _ in range(10):
            dealt = deal.next(17, cursor, None)
            assert dealt is not None
            cursor = dealt.cursor
        assert len(reads) == 3


def test_keys_epochs_and_lanes_shuffle_differently() -> None:
    source = table([1] * 400)
    orders = {
        tuple(unit.sample for unit in lane_epoch(SourceDeal(source, settings(2, key=key)), lane, epoch)[0])
        for key in (1, 2)
        for lane in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    assert all(list(order) != sorted(order) for order in orders)


def test_whole_shards_are_shuffled_within_windows_only() -> None:
    """With enough shards, a lane reads its shards window by window: few are open at a time."""
    num_shards, shard, window = 12, 10, 3
    starts = list(range(0, num_shards * shard, shard))
    deal = SourceDeal(table([1] * num_shards * shard, first_samples=starts), settings(2, window))
    for lane in (0, 1):
        shards = [unit.sample // shard for unit in lane_epoch(deal, lane, 0)[0]]
        windows = [shards[i : i + window * shard] for i in range(0, len(shards), window * shard)]
        assert [len(set(seen)) for seen in windows] == [window] * 2
        assert all(seen != sorted(seen) for seen in windows)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=10), num_chunks=st.integers(1, 60))
def test_cut_shards_makes_enough_even_chunks(sizes: list[int], num_chunks: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    chunks = cut_shards(bounds, num_chunks)
    assert set(bounds) <= set(chunks)
    assert all(start < stop for start, stop in pairwise(chunks))
    assert len(chunks) - 1 >= min(num_chunks, bounds[-1])
    assert np.diff(chunks).max() <= max(1, bounds[-1] // num_chunks)


def test_a_source_without_a_fitting_sample_is_refused() -> None:
    deal = SourceDeal(table([500, 50], [1, CAP + 1]), settings(1))
    with pytest.raises(
        UserError, match=r"data\.sources\.pages: of 8 samples dealt to lane 0, none fits a row of 100 "
    ):
        deal.next(0, Cursor(0, 0, 0), None)


def test_a_source_with_fewer_samples_than_lanes_is_refused() -> None:
    with pytest.raises(UserError, match=r"pages has 3 samples, .*4 lanes .*data\.lanes to at most 3"):
        SourceDeal(table([5, 5, 5]), settings(4))


def test_a_text_source_with_images_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.sources\.pages\.modality is text, but its samples hold 2 image"
    ):
        replace(table([5, 5], [0, 2]), modality=TEXT)
