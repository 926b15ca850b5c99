"""Microbatches from packs: segments partition the positions, labels come next, failures carry no loss."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.batch import (
    PADDING,
    RowRule,
    UnitTokens,
    assemble,
    blank_unit,
    cut_unit,
    lay_out,
    mask_failed,
    microbatch_length,
    split_packs,
)
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.text import EncodedSample
from megatron_vl.data.types import Pack, Unit

FILLER = 9


def unit(num_tokens: int, num_images: int = 0, sample: int = 0) -> Unit:
    return Unit(source="s", sample=sample, piece=0, num_tokens=num_tokens, num_images=num_images)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[Pack], RowRule]:
    """Rows of a packing stage: any number of units that fit, none included."""
    length, size = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    packs = []
    for _ in range(size):
        lengths = draw(st.lists(st.integers(1, length), max_size=6))
        fitting = [count for count, end in zip(lengths, accumulate(lengths), strict=True) if end <= length]
        packs.append(Pack(units=tuple(unit(count, count % 3, i) for i, count in enumerate(fitting))))
    return packs, RowRule(sequence_length=length, packing=True, micro_batch_size=size)


@st.composite
def single_rows(draw: st.DrawFn) -> tuple[list[Pack], RowRule]:
    """Rows of a stage that does not pack: one unit each."""
    size = draw(st.integers(1, 4))
    packs = [Pack(units=(unit(draw(st.integers(1, 30))),)) for _ in range(size)]
    multiple = draw(st.integers(1, 16))
    return packs, RowRule(sequence_length=30, packing=False, micro_batch_size=size, pad_multiple=multiple)


def random_tokens(packs: list[Pack]) -> list[UnitTokens]:
    generator = np.random.default_rng(0)
    return [
        UnitTokens(
            inputs=generator.integers(10, 99, each.num_tokens),
            labels=generator.integers(10, 99, each.num_tokens),
            loss_mask=generator.integers(0, 2, each.num_tokens).astype(bool),
        )
        for pack in packs
        for each in pack.units
    ]


def build(packs: list[Pack], rule: RowRule, tokens: list[UnitTokens] | None) -> Microbatch:
    length = microbatch_length([packs], rule)
    layout = lay_out(packs, rule, length)
    return assemble(layout, tokens, None, with_inputs=True, with_labels=True, filler_id=FILLER)


@given(rows=packed_rows() | single_rows())
def test_segments_partition_the_positions_and_hold_the_units_in_order(
    rows: tuple[list[Pack], RowRule],
) -> None:
    packs, rule = rows
    tokens = random_tokens(packs)
    batch = build(packs, rule, tokens)
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds == sorted(set(bounds))
    assert batch.units == tuple(each for pack in packs for each in pack.units)
    assert [index for index in batch.segment_units if index != PADDING] == list(range(len(batch.units)))
    assert batch.max_seqlen == max(np.diff(bounds))
    assert batch.num_images == sum(pack.num_images for pack in packs)
    for tensor in (batch.tokens_1S, batch.labels_1S, batch.loss_mask_1S):
        assert tensor is not None
        assert tensor.shape == (1, bounds[-1])
    for segment, index in enumerate(batch.segment_units):
        here = slice(bounds[segment], bounds[segment + 1])
        inputs, labels, mask = (
            each[0, here] for each in (batch.tokens_1S, batch.labels_1S, batch.loss_mask_1S)
        )
        if index == PADDING:
            assert (inputs == FILLER).all()
            assert not mask.any()
        else:
            np.testing.assert_array_equal(inputs, tokens[index].inputs)
            np.testing.assert_array_equal(labels, tokens[index].labels)
            np.testing.assert_array_equal(mask, tokens[index].loss_mask)


@given(rows=packed_rows())
def test_packed_rows_have_the_sequence_length_each(rows: tuple[list[Pack], RowRule]) -> None:
    packs, rule = rows
    batch = build(packs, rule, None)
    bounds = batch.cu_seqlens.tolist()
    row_ends = [(row + 1) * rule.sequence_length for row in range(rule.micro_batch_size)]
    assert set(row_ends) <= set(bounds)
    assert bounds[-1] == row_ends[-1]
    starts = [bounds[segment] for segment, index in enumerate(batch.segment_units) if index != PADDING]
    rows_of_units = [row for row, pack in enumerate(packs) for _ in pack.units]
    assert [start // rule.sequence_length for start in starts] == rows_of_units


@given(rows=single_rows())
def test_rows_of_one_unit_are_padded_once_at_the_end(rows: tuple[list[Pack], RowRule]) -> None:
    packs, rule = rows
    batch = build(packs, rule, None)
    total = sum(pack.num_tokens for pack in packs)
    assert batch.num_tokens % rule.pad_multiple == 0
    assert total <= batch.num_tokens < total + rule.pad_multiple
    assert batch.segment_units == (*range(len(packs)), *([PADDING] if batch.num_tokens > total else []))


def test_microbatches_of_a_step_have_the_length_of_the_longest() -> None:
    rule = RowRule(sequence_length=100, packing=False, micro_batch_size=2, pad_multiple=8)
    split = split_packs([Pack(units=(unit(count),)) for count in (3, 4, 20, 1)], rule)
    assert [[pack.num_tokens for pack in packs] for packs in split] == [[3, 4], [20, 1]]
    assert microbatch_length(split, rule) == 24
    assert lay_out(split[0], rule, 24).segment_lengths == (3, 4, 17)
    with pytest.raises(ValueError, match="3 rows do not divide into microbatches of 2"):
        split_packs([Pack(units=(unit(1),))] * 3, rule)


def test_ranks_that_read_nothing_know_the_shapes() -> None:
    packs = [Pack(units=(unit(5, 1), unit(2)))]
    rule = RowRule(sequence_length=10, packing=True, micro_batch_size=1)
    with_data, without = build(packs, rule, random_tokens(packs)), build(packs, rule, None)
    assert (without.tokens_1S, without.labels_1S, without.loss_mask_1S, without.images_NCHW) == (None,) * 4
    assert without.cu_seqlens.tolist() == with_data.cu_seqlens.tolist() == [0, 5, 7, 10]
    assert without.segment_units == with_data.segment_units == (0, 1, PADDING)
    assert (without.max_seqlen, without.num_images) == (with_data.max_seqlen, with_data.num_images) == (5, 1)


@given(
    tokens=st.lists(st.integers(0, 50), min_size=2, max_size=60), length=st.integers(1, 20), data=st.data()
)
def test_pieces_of_a_document_hold_each_label_once_after_its_token(
    tokens: list[int], length: int, data: st.DataObject
) -> None:
    supervised = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    encoded = EncodedSample(tokens=np.array(tokens), supervised=np.array(supervised))
    num_pieces = -(-(len(tokens) - 1) // length)
    pieces = [cut_unit(encoded, piece, length) for piece in range(num_pieces)]
    assert all(len(piece.inputs) == length for piece in pieces[:-1])
    assert 1 <= len(pieces[-1].inputs) <= length
    pairs = [
        pair for piece in pieces for pair in zip(piece.inputs.tolist(), piece.labels.tolist(), strict=True)
    ]
    assert pairs == list(pairwise(tokens))
    assert [flag for piece in pieces for flag in piece.loss_mask.tolist()] == supervised[1:]
    assert len(cut_unit(encoded, num_pieces, length).inputs) == 0


def test_a_blank_unit_has_room_for_its_images_and_no_loss() -> None:
    with pytest.raises(ValueError, match="a unit of 3 positions has no room for 4 image tokens"):
        blank_unit(3, 4, image_id=7, filler_id=FILLER)
    blank = blank_unit(6, 4, image_id=7, filler_id=FILLER)
    assert blank.inputs.tolist() == [7, 7, 7, 7, FILLER, FILLER]
    assert len(blank.labels) == 6
    assert not blank.loss_mask.any()


@given(rows=packed_rows(), data=st.data())
def test_failed_units_lose_their_loss_and_nothing_else_changes(
    rows: tuple[list[Pack], RowRule], data: st.DataObject
) -> None:
    packs, rule = rows
    batch = build(packs, rule, random_tokens(packs))
    before = batch.loss_mask_1S.clone()
    failed = data.draw(st.sets(st.sampled_from(range(len(batch.units))))) if batch.units else set()
    masked = mask_failed(mask_failed(batch, sorted(failed)[:1]), sorted(failed)[1:])
    assert masked.failed_units == tuple(sorted(failed))
    bounds = batch.cu_seqlens.tolist()
    for segment, index in enumerate(batch.segment_units):
        here = slice(bounds[segment], bounds[segment + 1])
        expected = 0 * before[0, here] if index in failed else before[0, here]
        assert torch.equal(masked.loss_mask_1S[0, here], expected)
    assert torch.equal(batch.loss_mask_1S, before)
    assert masked.tokens_1S is batch.tokens_1S


def test_what_does_not_fit_the_plan_is_refused() -> None:
    packs = [Pack(units=(unit(5), unit(6)))]
    rule = RowRule(sequence_length=10, packing=True, micro_batch_size=1)
    with pytest.raises(ValueError, match="row 0 ends at 11, beyond 10"):
        lay_out(packs, rule, 10)
    packs = [Pack(units=(unit(5),))]
    tokens = random_tokens([Pack(units=(unit(4),))])
    with pytest.raises(ValueError, match=r"segments hold \[4, 5\] tokens, the plan says \[5, 5\]"):
        build(packs, rule, tokens)
