"""Packs hold what fits, lose nothing, and put those first that waited too long."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.packing import PackingRule, Waiting
from megatron_vl.data.types import Pack, Unit

ROW, CAP, OVERDUE = 100, 5, 4


def rule(num_rows: int = 3, window: int = 20) -> PackingRule:
    return PackingRule(
        num_rows=num_rows, sequence_length=ROW, max_images=CAP, window=window, max_carry_steps=OVERDUE
    )


def waiting(sample: int, num_tokens: int, num_images: int = 0, age: int = 0) -> Waiting:
    unit = Unit(source="pages", sample=sample, piece=0, num_tokens=num_tokens, num_images=num_images)
    return Waiting(unit=unit, age=age)


def samples(packs: list[Pack]) -> list[list[int]]:
    return [[unit.sample for unit in pack.units] for pack in packs]


@st.composite
def pools(draw: st.DrawFn) -> tuple[PackingRule, list[Waiting]]:
    """A rule, and a pool that the rule finds large enough, oldest first."""
    packing = rule(num_rows=draw(st.integers(1, 4)), window=draw(st.integers(1, 40)))
    pool: list[Waiting] = []
    while packing.wants_more(len(pool), sum(one.unit.num_tokens for one in pool)):
        tokens, images = draw(st.integers(1, ROW)), draw(st.integers(0, CAP))
        pool.append(waiting(len(pool), tokens, images, age=draw(st.integers(0, 2 * OVERDUE))))
    return packing, sorted(pool, key=lambda one: -one.age)


@given(case=pools())
def test_packs_respect_row_and_image_cap(case: tuple[PackingRule, list[Waiting]]) -> None:
    packing, pool = case
    packs, _ = packing.emit(pool)
    assert len(packs) == packing.num_rows
    assert all(pack.units and pack.num_tokens <= ROW and pack.num_images <= CAP for pack in packs)


@given(case=pools())
def test_every_unit_is_emitted_or_left_a_batch_older(case: tuple[PackingRule, list[Waiting]]) -> None:
    packing, pool = case
    packs, left = packing.emit(pool)
    emitted = Counter(unit for pack in packs for unit in pack.units)
    assert emitted + Counter(one.unit for one in left) == Counter(one.unit for one in pool)
    ages = {one.unit: one.age for one in pool}
    assert all(one.age == ages[one.unit] + 1 for one in left)


@given(case=pools())
def test_overdue_units_go_first(case: tuple[PackingRule, list[Waiting]]) -> None:
    """No row is emitted before an overdue unit unless it holds one at least as old."""
    packing, pool = case
    packs, left = packing.emit(pool)
    ages = {one.unit: one.age for one in pool}
    oldest_left = max((one.age - 1 for one in left), default=0)
    if oldest_left >= OVERDUE:
        assert all(max(ages[unit] for unit in pack.units) >= oldest_left for pack in packs)


@given(case=pools())
def test_units_keep_their_order_within_a_pack(case: tuple[PackingRule, list[Waiting]]) -> None:
    packing, pool = case
    places = {one.unit: i for i, one in enumerate(pool)}
    for pack in packing.emit(pool)[0]:
        assert [places[unit] for unit in pack.units] == sorted(places[unit] for unit in pack.units)


def test_the_fullest_rows_are_emitted() -> None:
    pool = [waiting(i, tokens) for i, tokens in enumerate([60, 20, 55, 40, 80, 45])]
    packs, left = rule(num_rows=2).emit(pool)
    assert samples(packs) == [[1, 4], [0, 3]]
    assert left == (waiting(2, 55, age=1), waiting(5, 45, age=1))


def test_best_fit_takes_the_tightest_row() -> None:
    """The 2 joins 60 + 38, not the first or emptiest row, that of 65."""
    pool = [waiting(i, tokens) for i, tokens in enumerate([65, 60, 38, 2])]
    assert samples(rule(num_rows=2).emit(pool)[0]) == [[1, 2, 3], [0]]


def test_an_overdue_unit_displaces_fuller_rows() -> None:
    pool = [waiting(0, 10, age=OVERDUE), waiting(1, 100), waiting(2, 95)]
    assert samples(rule(num_rows=1).emit(pool)[0]) == [[0]]
    pool[0] = waiting(0, 10, age=OVERDUE - 1)
    assert samples(rule(num_rows=1).emit(pool)[0]) == [[1]]


def test_a_pool_too_small_or_a_unit_too_large_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 3 rows"):
        rule(num_rows=3).emit([waiting(0, 10)])
    with pytest.raises(ValueError, match="exceeds 100 tokens or 5 images"):
        rule(num_rows=1).emit([waiting(0, 10, num_images=CAP + 1)])
    with pytest.raises(ValueError, match="exceeds 100 tokens or 5 images"):
        rule(num_rows=1).emit([waiting(0, ROW + 1)])


def test_the_pool_grows_to_the_window_but_not_beyond_what_is_emitted_in_time() -> None:
    packing = rule(num_rows=2, window=8)
    assert packing.wants_more(num_units=50, num_tokens=ROW)  # might fill one row only
    assert packing.wants_more(num_units=7, num_tokens=2 * ROW)
    assert not packing.wants_more(num_units=8, num_tokens=2 * ROW)
    assert not packing.wants_more(num_units=7, num_tokens=2 * ROW * OVERDUE // 2)
