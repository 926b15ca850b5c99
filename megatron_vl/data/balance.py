"""Deals rows to data-parallel ranks so that none waits for the others: longest processing time first.

A deal changes who computes a row, never which rows a step has, so the gradient stays the same.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.types import Pack


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What a row costs the pipeline stage that takes longest: integers, so that all machines deal alike.

    `per_pair` is for a million pairs of tokens that see each other; the unit is the same for all, and no matter.
    """

    per_token: int
    per_image: int
    per_pair: int

    def of(self, pack: Pack) -> int:
        tokens, images, pairs = 0, 0, 0
        for unit in pack.units:
            tokens += unit.num_tokens
            images += unit.num_images
            pairs += unit.num_tokens * unit.num_tokens
        # Causal attention: a token sees those before it.
        return tokens * self.per_token + images * self.per_image + pairs // 2 * self.per_pair // 1_000_000


def deal_rows(packs: Sequence[Pack], num_ranks: int, cost: RowCost) -> list[list[Pack]]:
    """The rows of each rank, equally many for all, in the order of falling cost.

    Ties fall by position and by rank. Raises ValueError where the rows do not divide.
    """
    share, rest = divmod(len(packs), num_ranks)
    if rest:
        raise ValueError(f"{len(packs)} rows do not divide into {num_ranks} ranks")
    costs = [cost.of(pack) for pack in packs]
    ranks: list[list[Pack]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for place in sorted(range(len(packs)), key=lambda place: -costs[place]):
        load, rank = loads[0]
        ranks[rank].append(packs[place])
        if len(ranks[rank]) < share:
            heapq.heapreplace(loads, (load + costs[place], rank))
        else:
            heapq.heappop(loads)
    return ranks
