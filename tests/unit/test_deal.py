"""Every epoch deals each unit of a source to one lane, once; lanes shuffle it in windows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.deal import DealSettings, SourceDeal, SourceTable, cut_shards, piece_range
from megatron_vl.data.types import MULTIMODAL, TEXT, Unit

ROW, CAP = 100, 3


def table(
    num_tokens: list[int], num_images: list[int] | None = None, shard_starts: list[int] | None = None
) -> SourceTable:
    images = num_images or [0] * len(num_tokens)
    return SourceTable(
        name="pages",
        modality=MULTIMODAL if any(images) else TEXT,
        num_tokens=np.array(num_tokens, dtype=np.int32),
        num_images=np.array(images, dtype=np.int32),
        shard_starts=np.array(shard_starts or [0, len(num_tokens)]),
        digest="0",
    )


def settings(lanes: int, shuffle_window: int = 2, key: int = 7) -> DealSettings:
    return DealSettings(
        key=key, lanes=lanes, shuffle_window=shuffle_window, sequence_length=ROW, max_images_per_pack=CAP
    )


def lane_epoch(deal: SourceDeal, lane: int, epoch: int) -> list[Unit]:
    return [deal.unit(lane, epoch, position) for position in range(deal.num_units(lane, epoch))]


@st.composite
def deals(draw: st.DrawFn) -> SourceDeal:
    """Sources of short and long documents, samples that fit no row, and shards of any size, even empty."""
    num_samples = draw(st.integers(1, 60))
    tokens = draw(st.lists(st.integers(0, 4 * ROW), min_size=num_samples, max_size=num_samples))
    images = draw(st.lists(st.integers(0, CAP + 1), min_size=num_samples, max_size=num_samples))
    cuts = draw(st.lists(st.integers(0, num_samples), max_size=12))
    tokens[0], images[0] = 1, 0
    source = table(tokens, images, [0, *sorted(cuts), num_samples])
    num_kept = sum(piece_counts(source) > 0)
    lanes, window = draw(st.integers(1, num_kept)), draw(st.integers(1, 4))
    return SourceDeal(source, settings(lanes, window, key=draw(st.integers(0, 9))))


def piece_counts(source: SourceTable) -> np.ndarray:
    """Units per sample, from the definition."""
    whole = (source.num_images > 0) & (source.num_images <= CAP) & (source.num_tokens <= ROW)
    text = source.num_images == 0
    return np.where(text, np.ceil(source.num_tokens / ROW), whole & (source.num_tokens > 0)).astype(int)


@given(deal=deals(), epoch=st.integers(0, 3))
def test_every_unit_is_dealt_once_per_epoch(deal: SourceDeal, epoch: int) -> None:
    counts = piece_counts(deal.table)
    expected = {(sample, piece) for sample, num in enumerate(counts) for piece in range(num)}
    dealt = [u for lane in range(deal.settings.lanes) for u in lane_epoch(deal, lane, epoch)]
    assert Counter((unit.sample, unit.piece) for unit in dealt) == Counter(expected)
    assert deal.num_left_out == int((counts == 0).sum())
    assert deal.units_per_sample * int((counts > 0).sum()) == len(dealt)


@given(deal=deals())
def test_units_fit_a_row_and_pieces_make_up_their_document(deal: SourceDeal) -> None:
    lengths: Counter[int] = Counter()
    for lane in range(deal.settings.lanes):
        for unit in lane_epoch(deal, lane, 0):
            assert 0 < unit.num_tokens <= ROW
            assert unit.num_images == deal.table.num_images[unit.sample] <= CAP
            lengths[unit.sample] += unit.num_tokens
    assert all(length == deal.table.num_tokens[sample] for sample, length in lengths.items())


@given(deal=deals(), data=st.data())
def test_a_unit_does_not_depend_on_what_was_asked_before(deal: SourceDeal, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, deal.settings.lanes - 1))
    expected = [lane_epoch(deal, lane, epoch) for epoch in (0, 1)]
    fresh = SourceDeal(deal.table, deal.settings)
    epoch = data.draw(st.integers(0, 1))
    position = data.draw(st.integers(0, len(expected[epoch]) - 1))
    assert fresh.unit(lane, epoch, position) == expected[epoch][position]


@given(num_tokens=st.integers(1, 1000), row=st.integers(1, 120))
def test_piece_ranges_are_consecutive(num_tokens: int, row: int) -> None:
    ranges = [piece_range(num_tokens, piece, row) for piece in range(-(-num_tokens // row))]
    covered = [position for start, stop in ranges for position in range(start, stop)]
    assert covered == list(range(num_tokens))


def test_keys_epochs_and_lanes_shuffle_differently() -> None:
    source = table([1] * 400)
    orders = {
        tuple(unit.sample for unit in lane_epoch(SourceDeal(source, settings(2, key=key)), lane, epoch))
        for key in (1, 2)
        for lane in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    assert all(list(order) != sorted(order) for order in orders)


def test_whole_shards_are_shuffled_within_windows_only() -> None:
    """With enough shards, a lane reads its shards window by window: few are open at a time."""
    num_shards, shard, window = 12, 10, 3
    starts = list(range(0, num_shards * shard + 1, shard))
    deal = SourceDeal(table([1] * starts[-1], shard_starts=starts), settings(2, window))
    for lane in (0, 1):
        shards = [unit.sample // shard for unit in lane_epoch(deal, lane, 0)]
        windows = [shards[i : i + window * shard] for i in range(0, len(shards), window * shard)]
        assert [len(set(seen)) for seen in windows] == [window] * 2
        assert all(seen != sorted(seen) for seen in windows)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=10), num_chunks=st.integers(1, 60))
def test_cut_shards_makes_enough_even_chunks(sizes: list[int], num_chunks: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    chunks = cut_shards(bounds, num_chunks)
    assert set(bounds) <= set(chunks)
    assert (np.diff(chunks) > 0).all()
    assert len(chunks) - 1 >= min(num_chunks, bounds[-1])
    if len(sizes) < num_chunks:
        assert np.diff(chunks).max() <= max(1, bounds[-1] // num_chunks)


def test_a_source_without_a_fitting_sample_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.sources\.pages: of 2 samples, 0 fit a row of 100 tokens .*lengthen the row"
    ):
        SourceDeal(table([500, 50], [1, CAP + 1]), settings(1))


def test_a_source_with_fewer_samples_than_lanes_is_refused() -> None:
    with pytest.raises(UserError, match=r"of 3 samples, 3 fit .*4 lanes .*data\.lanes to at most 3"):
        SourceDeal(table([5, 5, 5]), settings(4))


def test_a_text_source_with_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.sources\.pages\.modality is text, but its sample 1 holds 2"):
        SourceTable(
            name="pages",
            modality=TEXT,
            num_tokens=np.array([5, 5]),
            num_images=np.array([0, 2]),
            shard_starts=np.array([0, 2]),
            digest="0",
        )
