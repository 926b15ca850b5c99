"""Packs hold what fits, lose nothing, put those first that waited too long, and leave nothing at a flush."""

from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.packing import PackingRule, Waiting
from megatron_vl.data.types import Pack, Unit

ROW, CAP, OVERDUE, FLUSH = 100, 5, 4, 8
LATE = 1000  # batches to the next flush: it has no say yet


def rule(window: int = 20, max_carry_steps: int = OVERDUE) -> PackingRule:
    return PackingRule(
        sequence_length=ROW,
        max_images=CAP,
        window=window,
        max_carry_steps=max_carry_steps,
        flush_steps=FLUSH,
    )


def unit(sample: int, num_tokens: int, num_images: int = 0) -> Unit:
    return Unit(source="pages", sample=sample, piece=0, num_tokens=num_tokens, num_images=num_images)


def waiting(sample: int, num_tokens: int, num_images: int = 0, age: int = 0) -> Waiting:
    return Waiting(unit(sample, num_tokens, num_images), age)


class Source:
    """Gives units in turn, and remembers which were taken."""

    def __init__(self, sizes: Iterator[tuple[int, int]]) -> None:
        self._sizes, self._numbers = sizes, count(1000)
        self._back: list[Unit] = []
        self.taken: list[Unit] = []

    def draw(self) -> Unit:
        self.taken.append(self._back.pop() if self._back else unit(next(self._numbers), *next(self._sizes)))
        return self.taken[-1]

    def undo(self) -> None:
        self._back.append(self.taken.pop())


def nothing() -> Source:
    return Source(iter(()))


def samples(packs: list[Pack]) -> list[list[int]]:
    return [[one.sample for one in pack.units] for pack in packs]


SIZES = st.tuples(st.integers(1, ROW), st.integers(0, CAP))


@st.composite
def sources(draw: st.DrawFn) -> Source:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=30))
    return Source(sizes[n % len(sizes)] for n in count())


@st.composite
def pools(draw: st.DrawFn) -> list[Waiting]:
    drawn = draw(st.lists(st.tuples(SIZES, st.integers(0, 2 * OVERDUE)), max_size=20))
    pool = [waiting(n, *sizes, age=age) for n, (sizes, age) in enumerate(drawn)]
    return sorted(pool, key=lambda one: -one.age)


@given(pool=pools(), source=sources(), num_rows=st.integers(1, 4), window=st.integers(1, 40))
def test_rows_hold_what_fits_and_nothing_is_lost(
    pool: list[Waiting], source: Source, num_rows: int, window: int
) -> None:
    packs, left = rule(window).pack(pool, num_rows, LATE, source)
    assert len(packs) == num_rows
    assert all(pack.units and pack.num_tokens <= ROW and pack.num_images <= CAP for pack in packs)
    emitted = Counter(one for pack in packs for one in pack.units)
    assert emitted + Counter(one.unit for one in left) == Counter([one.unit for one in pool] + source.taken)
    ages = {one.unit: one.age for one in pool}
    assert all(one.age == ages.get(one.unit, 0) + 1 for one in left)


@given(pool=pools(), source=sources(), num_rows=st.integers(1, 4))
def test_overdue_units_go_first(pool: list[Waiting], source: Source, num_rows: int) -> None:
    """No row is emitted before an overdue unit unless it holds one at least as old."""
    packs, left = rule().pack(pool, num_rows, LATE, source)
    ages = {one.unit: one.age for one in pool}
    oldest_left = max((one.age - 1 for one in left), default=0)
    if oldest_left >= OVERDUE:
        assert all(max(ages.get(one, 0) for one in pack.units) >= oldest_left for pack in packs)


@settings(max_examples=300)
@given(
    source=sources(),
    num_rows=st.integers(1, 4),
    window=st.integers(1, 60),
    begun=st.integers(0, FLUSH - 1),
    carry=st.integers(0, OVERDUE),
)
def test_a_flush_leaves_nothing_and_every_batch_is_full_sized(
    source: Source, num_rows: int, window: int, begun: int, carry: int
) -> None:
    packing, left, emitted = rule(window, carry), (), Counter[Unit]()
    for batch in range(begun, 3 * FLUSH):
        packs, left = packing.pack(left, num_rows, FLUSH - batch % FLUSH, source)
        assert len(packs) == num_rows
        assert all(pack.units and pack.num_tokens <= ROW and pack.num_images <= CAP for pack in packs)
        emitted.update(one for pack in packs for one in pack.units)
        if batch % FLUSH == FLUSH - 1:
            assert left == ()
    assert emitted == Counter(source.taken)


def test_a_flush_fills_its_rows_beyond_the_window() -> None:
    source = Source((10, 0) for _ in count())
    packs, left = rule(window=1).pack([waiting(0, 50)], 2, 1, source)
    assert [pack.num_tokens for pack in packs] == [ROW, ROW]
    assert left == ()


def test_the_fullest_rows_are_emitted() -> None:
    pool = [waiting(i, tokens) for i, tokens in enumerate([60, 20, 55, 40, 80, 45])]
    packs, left = rule(window=1).pack(pool, 2, LATE, nothing())
    assert samples(packs) == [[1, 4], [0, 3]]
    assert left == (waiting(2, 55, age=1), waiting(5, 45, age=1))


def test_best_fit_takes_the_tightest_row() -> None:
    """The 2 joins 60 + 38, not the first or emptiest row, that of 65."""
    pool = [waiting(i, tokens) for i, tokens in enumerate([65, 60, 38, 2])]
    assert samples(rule(window=1).pack(pool, 2, LATE, nothing())[0]) == [[1, 2, 3], [0]]


def test_an_overdue_unit_displaces_fuller_rows() -> None:
    pool = [waiting(0, 10, age=OVERDUE), waiting(1, 100), waiting(2, 95)]
    assert samples(rule(window=1).pack(pool, 1, LATE, nothing())[0]) == [[0]]
    pool[0] = waiting(0, 10, age=OVERDUE - 1)
    assert samples(rule(window=1).pack(pool, 1, LATE, nothing())[0]) == [[1]]


@pytest.mark.parametrize("too_large", [unit(0, 10, CAP + 1), unit(0, ROW + 1)])
def test_a_unit_larger_than_a_row_is_an_error(too_large: Unit) -> None:
    for batches_left in (LATE, 1):
        with pytest.raises(ValueError, match="exceeds 100 tokens or 5 images"):
            rule().pack([Waiting(too_large, 0)], 1, batches_left, Source((1, 0) for _ in count()))


@pytest.mark.parametrize(
    ("held", "window", "num_drawn"),
    [
        ([ROW // 2] * 2, 2, 1),  # might fill one row of two only, so one more is drawn
        ([ROW // 2] * 3, 8, 5),  # up to the window
        ([ROW] * 4, 8, 0),  # but not beyond what two batches emit, half of OVERDUE
    ],
)
def test_the_pool_grows_to_the_window_but_not_beyond_what_is_emitted_in_time(
    held: list[int], window: int, num_drawn: int
) -> None:
    source = Source((10, 0) for _ in count())
    rule(window).pack([waiting(i, tokens) for i, tokens in enumerate(held)], 2, LATE, source)
    assert len(source.taken) == num_drawn
