"""The split that is chosen is the best of all, or close to it; the classic split is exact."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.planning.layout import parse_layout, resolve_layout
from megatron_vl.planning.rebalance import (
    Counts,
    Pipeline,
    RankCosts,
    ScoredSplit,
    Split,
    best_splits,
    min_max,
    spread_over_chunks,
)
from megatron_vl.planning.schedule import Schedule
from megatron_vl.planning.simulate import Array, replay
from megatron_vl.planning.topology import Topology

FORWARD, BACKWARD = 1.0, 2.0  # seconds of a layer


class Stage:
    """Text and multimodal steps of a made-up model: head and images in layers, frozen towers."""

    def __init__(self, pipeline: Pipeline, num_microbatches: int, head: float, vision: float) -> None:
        self.pipeline, self.head, self.vision = pipeline, head, vision
        self.schedule = Schedule(
            pipeline_size=pipeline.pipeline_size,
            virtual_size=pipeline.virtual_size,
            num_microbatches=num_microbatches,
        )
        self.num_simulated = 0

    def seconds(self, splits: Split) -> Array:
        self.num_simulated += splits.shape[1]
        return sum(
            (share * self.step(splits, images) for share, images in ((0.7, 0), (0.3, 1))), np.zeros(())
        )

    def step(self, splits: Split, images: int) -> Array:
        passes = np.stack([FORWARD * splits, BACKWARD * splits])
        passes[0, 0] += images * self.vision * FORWARD
        passes[:, -1] += self.head * np.array([[FORWARD], [BACKWARD]])
        passes = np.repeat(passes[:, :, None], self.schedule.num_microbatches, axis=2)
        return replay(self.schedule, passes, 0.05).seconds

    def costs(self) -> list[RankCosts]:
        count, last = self.schedule.num_microbatches, self.pipeline.pipeline_size - 1
        kinds = []
        for share, images in ((0.7, 0), (0.3, 1)):
            base = [0.0] * self.pipeline.pipeline_size
            base[0] += count * images * self.vision * FORWARD
            base[last] += count * self.head * (FORWARD + BACKWARD)
            kinds.append(RankCosts(share=share, base=tuple(base), layer=count * (FORWARD + BACKWARD)))
        return kinds

    def start(self) -> Counts:
        size, layers = self.pipeline.pipeline_size, self.pipeline.num_layers
        least = tuple(sum(self.pipeline.least[rank::size]) for rank in range(size))
        by_rank = min_max(self.costs(), layers, least, (layers,) * size)
        assert by_rank is not None
        return spread_over_chunks(by_rank, self.pipeline, (self.vision / 3, self.head))

    def search(self, exhaustive: int) -> list[ScoredSplit]:
        return best_splits(self.pipeline, self.seconds, [self.start()], exhaustive=exhaustive)


def objective(costs: list[RankCosts], by_rank: Counts) -> float:
    return sum(
        kind.share * max(base + kind.layer * count for base, count in zip(kind.base, by_rank, strict=True))
        for kind in costs
    )


@given(st.integers(1, 4), st.integers(1, 2), st.integers(0, 9))
def test_all_splits_are_all_layouts_once(pipeline_size: int, virtual_size: int, num_layers: int) -> None:
    virtual_size = virtual_size if pipeline_size > 1 else 1
    pipeline = Pipeline(num_layers=num_layers, pipeline_size=pipeline_size, virtual_size=virtual_size)
    splits = list(pipeline.all_splits()) if pipeline.num_splits else []
    by_product = [
        counts
        for counts in product(range(num_layers + 1), repeat=pipeline.num_chunks)
        if sum(counts) == num_layers and all(counts[1:-1])
    ] if pipeline.num_chunks < 7 else splits  # fmt: skip
    assert sorted(splits) == sorted(by_product)
    assert len(splits) == pipeline.num_splits
    topology = Topology(world_size=pipeline_size, pipeline_size=pipeline_size, virtual_size=virtual_size)
    for counts in splits[:20]:
        layout = ScoredSplit(counts=counts, seconds=0.0).layout
        chunks = parse_layout(resolve_layout(layout, num_layers, topology))
        assert [chunk.count("t") for chunk in chunks] == list(counts)


@given(st.data())
def test_the_classic_split_is_the_best_of_all(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    num_layers = data.draw(st.integers(0, 8))
    number = st.floats(0, 10, allow_nan=False)
    costs = [
        RankCosts(
            share=share,
            base=tuple(data.draw(st.lists(number, min_size=ranks, max_size=ranks))),
            layer=data.draw(st.floats(0.5, 4)),
        )
        for share in data.draw(st.sampled_from([(1.0,), (0.7, 0.3)]))
    ]
    least = tuple(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    most = tuple(data.draw(st.lists(st.integers(0, 8), min_size=ranks, max_size=ranks)))
    allowed = [
        counts
        for counts in product(*(range(low, high + 1) for low, high in zip(least, most, strict=True)))
        if sum(counts) == num_layers
    ]
    found = min_max(costs, num_layers, least, most)
    if not allowed:
        assert found is None
    else:
        assert found in allowed
        best = min(objective(costs, counts) for counts in allowed)
        assert objective(costs, found) == pytest.approx(best, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2)]),
    st.integers(0, 5),
    st.integers(1, 3),
    st.floats(0, 4),
    st.floats(0, 3),
)
def test_the_search_ends_within_three_per_cent_of_the_best_split(
    sizes: tuple[int, int], extra: int, rounds: int, head: float, vision: float
) -> None:
    pipeline = Pipeline(num_layers=math.prod(sizes) + extra, pipeline_size=sizes[0], virtual_size=sizes[1])
    stage = Stage(pipeline, rounds * sizes[0], head, vision)
    every = stage.search(exhaustive=10**6)
    assert len(every) == pipeline.num_splits
    best = min(float(stage.seconds(np.array([one.counts]).T)[0]) for one in every)
    assert every[0].seconds == pytest.approx(best)
    assert stage.search(exhaustive=0)[0].seconds <= 1.03 * best


def test_a_large_search_looks_at_few_splits() -> None:
    pipeline = Pipeline(num_layers=30, pipeline_size=2, virtual_size=3)
    stage = Stage(pipeline, 18, 1.9, 4.0)
    found = stage.search(exhaustive=0)
    assert pipeline.num_splits > 140_000 and stage.num_simulated < 3000
    assert stage.search(exhaustive=0)[0] == found[0]
    assert sum(found[0].counts) == 30


def test_memory_bounds_the_layers_of_a_rank() -> None:
    pipeline = Pipeline(num_layers=12, pipeline_size=3, virtual_size=2)
    stage = Stage(pipeline, 6, 2.0, 2.0)
    for exhaustive in (0, 10**6):
        found = best_splits(pipeline, stage.seconds, [(0, 2, 3, 2, 3, 2)], (2, 5, 5), exhaustive)
        assert found and all(split.counts[0] + split.counts[3] <= 2 for split in found)
    assert best_splits(pipeline, stage.seconds, [(2,) * 6], (2, 4, 4), exhaustive=10**6) == []


def test_a_head_of_three_layers_and_vision_move_the_border() -> None:
    """Ten layers on two ranks, a head of 2.84 layers, a frozen image of 0.80, steps 70/30: simulated beforehand 6|4
    beats 5|5 by 1.09 to 1.10."""
    stage = Stage(Pipeline(num_layers=10, pipeline_size=2), 4, 2.84, 0.80)
    even, moved = stage.seconds(np.array([[5, 5], [6, 4]]).T)
    assert 1.085 < even / moved < 1.105
