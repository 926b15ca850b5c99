"""Dealt rows: the same rows, equally many each, and ranks that finish together."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.balance import RowCost, deal_rows
from megatron_vl.data.types import Pack, Unit

COST = RowCost(per_token=3, per_image=1000, per_pair=40_000)


def pack(number: int, *units: tuple[int, int]) -> Pack:
    return Pack(tuple(Unit("pages", number, piece, *size) for piece, size in enumerate(units)))


def test_a_row_costs_its_tokens_its_images_and_the_pairs_within_its_units() -> None:
    units = [(1000, 0), (2000, 2)]
    tokens, images, pairs = 3 * 3000, 2 * 1000, (1000**2 + 2000**2) // 2 * 40_000 // 1_000_000
    assert COST.of(pack(0, *units)) == tokens + images + pairs
    assert COST.of(pack(0, (3000, 2))) > COST.of(pack(0, *units))  # one long unit has more pairs


@given(
    tokens=st.lists(st.integers(1, 4096), min_size=1, max_size=60),
    num_ranks=st.integers(1, 8),
)
def test_every_row_is_dealt_once_and_ranks_get_equally_many(tokens: list[int], num_ranks: int) -> None:
    packs = [pack(n, (size, n % 3)) for n, size in enumerate(tokens)]
    packs = packs[: len(packs) // num_ranks * num_ranks]
    dealt = deal_rows(packs, num_ranks, COST)
    assert Counter(one for rank in dealt for one in rank) == Counter(packs)
    assert {len(rank) for rank in dealt} == {len(packs) // num_ranks}
    for rank in dealt:
        costs = [COST.of(one) for one in rank]
        assert costs == sorted(costs, reverse=True)


def test_ranks_finish_together() -> None:
    random = np.random.default_rng(0)
    packs = [pack(n, (int(random.integers(2000, 4096)), int(random.integers(0, 6)))) for n in range(64 * 8)]
    loads = [sum(COST.of(one) for one in rank) for rank in deal_rows(packs, 64, COST)]
    in_order = [sum(COST.of(one) for one in packs[start : start + 8]) for start in range(0, len(packs), 8)]
    assert max(loads) / np.mean(loads) < 1.01 < 1.1 < max(in_order) / np.mean(in_order)


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 rows do not divide into 2 ranks"):
        deal_rows([pack(n, (1, 0)) for n in range(3)], 2, COST)
