"""Every data-parallel size trains the same batches, of one modality each; no sample or room is wasted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.plan import Planner, plan_digest
from megatron_vl.data.plan_settings import PlanSettings, choose_lanes, rank_group
from megatron_vl.data.types import MIXED, MULTIMODAL, TEXT
from tests.support.plans import (
    CAP,
    LANES,
    MODALITIES,
    ROW,
    SETTINGS,
    all_units,
    plan_settings,
    planners,
    realistic_settings,
    realistic_tables,
    small_tables,
    step_packs,
    unit_id,
)


@hypothesis_settings(max_examples=25)
@given(settings=SETTINGS)
def test_packs_fit_their_rows_and_are_of_the_steps_modality(settings: PlanSettings) -> None:
    [planner] = planners(settings, 1)
    for _ in range(20):
        modality, packs = step_packs([planner])
        assert len(packs) == settings.global_batch_size
        for pack in packs:
            assert 0 < pack.num_tokens <= ROW
            assert pack.num_images <= CAP
            of_pack = {MODALITIES[unit.source] for unit in pack.units}
            assert len(of_pack) == 1
            assert modality == MIXED or of_pack == {modality}
            assert settings.packing or len(pack.units) == 1


@hypothesis_settings(max_examples=25)
@given(settings=SETTINGS)
def test_global_batch_does_not_depend_on_the_data_parallel_size(settings: PlanSettings) -> None:
    groups = [planners(settings, dp_size) for dp_size in (1, 2, 4)]
    for _ in range(10):
        one, two, four = (step_packs(ranks) for ranks in groups)
        assert one == two == four


@hypothesis_settings(max_examples=25)
@given(settings=SETTINGS, lanes=st.sampled_from([1, LANES]))
def test_no_sample_is_lost_or_repeated_within_an_epoch(settings: PlanSettings, lanes: int) -> None:
    """What was emitted and what is carried make up the epochs that the lanes stand in."""
    planner = Planner(small_tables(), replace(settings, lanes=lanes))
    dealt = Counter(unit_id(unit) for _ in range(60) for pack in planner.next().packs for unit in pack.units)
    states = planner.state().lanes
    dealt.update(unit_id(one.unit) for lane in states for pool in lane.waiting.values() for one in pool)
    for name, source in small_tables().items():
        epochs = [lane.cursors[name].epoch for lane in states]
        counts = {unit: dealt.pop(unit, 0) for unit in all_units(name, source)}
        assert all(min(epochs) <= num <= max(epochs) + 1 for num in counts.values())
    assert not dealt  # nothing but the sources' units


def test_one_lane_emits_each_unit_once_per_epoch() -> None:
    settings = plan_settings(
        lanes=1, sources={"docs": 1.0}, text_ratio=1.0, packing=False, global_batch_size=1
    )
    tables = small_tables()
    planner, expected = Planner(tables, settings), all_units("docs", tables["docs"])
    for epoch in range(3):
        units = [unit for _ in expected for pack in planner.next().packs for unit in pack.units]
        assert Counter(map(unit_id, units)) == Counter(expected)
        assert planner.state().lanes[0].cursors["docs"] == (epoch + 1, 0, 0)


def test_realised_modality_follows_the_schedule() -> None:
    [planner] = planners(plan_settings(text_ratio=0.7), 1)
    num_text, scheduled = 0, 0.0
    ratios = []
    for _ in range(100):
        plan = planner.next()
        num_text += plan.modality == TEXT
        scheduled += plan.text_ratio
        ratios.append(plan.text_ratio)
        assert abs(num_text - scheduled) < 1
    assert ratios[0] == 1.0
    assert ratios[10:] == [0.7] * 90


def test_samples_follow_the_weights_in_every_lane_and_step() -> None:
    [planner] = planners(plan_settings(text_ratio=0.0, text_warmup_fraction=0.0, packing=False), 1)
    plans = [planner.next() for _ in range(60)]
    per_lane: list[Counter[str]] = [Counter() for _ in range(LANES)]
    for plan in plans:
        for i, pack in enumerate(plan.packs):
            per_lane[i // 2][pack.units[0].source] += 1
    assert all(abs(counts["figures"] - 80) <= 2 for counts in per_lane)  # weights 1 : 2 over 120 draws
    # Lanes are out of step with each other, so that not every batch has the same sources.
    assert len({tuple(pack.units[0].source for pack in plans[0].packs[i : i + 2]) for i in (0, 2, 4, 6)}) > 1


def test_seeds_and_stages_give_different_plans() -> None:
    """With one lane and one source, all that can differ is the shuffle."""
    one = {"lanes": 1, "sources": {"docs": 1.0}, "text_ratio": 1.0}

    def first(**changes: object) -> int:
        return Planner(small_tables(), plan_settings(**one, **changes)).next().digest

    assert first() == first()
    assert len({first(), first(seed=1), first(stage="sft")}) == 3


def test_digest_tells_step_modality_rows_and_who_computes_them() -> None:
    [planner] = planners(plan_settings(), 1)
    plan = planner.next()
    digests = {
        plan.digest,
        plan_digest(plan.step, MULTIMODAL, [plan.packs]),
        plan_digest(plan.step + 1, plan.modality, [plan.packs]),
        plan_digest(plan.step, plan.modality, [plan.packs[::-1]]),
        plan_digest(plan.step, plan.modality, [plan.packs[1:]]),
        plan_digest(plan.step, plan.modality, [plan.packs[:4], plan.packs[4:]]),
    }
    assert len(digests) == 6
    assert all(0 <= digest < 2**52 for digest in digests)  # exact as a float
    assert plan.digest == plan_digest(plan.step, plan.modality, [plan.packs])


def test_samples_that_fit_no_row_are_left_out_and_counted_once_an_epoch() -> None:
    [planner] = planners(plan_settings(text_ratio=0.0, text_warmup_fraction=0.0), 1)
    while any(lane.cursors["pages"].epoch < 1 for lane in planner.state().lanes):
        planner.next()
    epochs = [lane.cursors["pages"].epoch for lane in planner.state().lanes]
    assert 2 <= planner.state().left_out["pages"] <= 2 * (max(epochs) + 1)
    assert planner.state().left_out["figures"] == 0


def test_real_lengths_fill_the_rows_and_nothing_waits_long() -> None:
    """Captions 50 %, OCR 25 %, interleaved 15 %, tables 10 %, in rows of 4096 with 576 tokens per image."""
    planner = Planner(realistic_tables(), realistic_settings())
    fills: dict[str, list[float]] = {TEXT: [], MULTIMODAL: []}
    oldest = 0
    for _ in range(60):
        plan = planner.next()
        fills[plan.modality] += [pack.num_tokens / 4096 for pack in plan.packs]
        waiting = [w for lane in planner.state().lanes for pool in lane.waiting.values() for w in pool]
        oldest = max([oldest, *(w.age for w in waiting)])
    assert np.mean(fills[MULTIMODAL]) >= 0.95  # seen: .963
    assert np.mean(fills[TEXT]) >= 0.985  # seen: .998
    assert oldest <= realistic_settings().max_carry_steps + 1


def test_lanes_divide_the_global_batch() -> None:
    assert [choose_lanes(256, size) for size in (2304, 256, 8, 12, 7)] == [256, 256, 8, 4, 1]
    with pytest.raises(UserError, match=r"4 lanes do not divide the global batch of 6"):
        Planner(small_tables(), plan_settings(global_batch_size=6))


def test_ranks_own_whole_lanes() -> None:
    assert [list(rank_group(4, 0, rank, 2).lanes) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=r"data-parallel size 3 .*4 lanes.* one of \[1, 2, 4\]"):
        rank_group(4, 0, 0, 3)


@given(data=st.data())
def test_groups_divide_lanes_and_ranks(data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, 60))
    dp_size = data.draw(st.sampled_from([size for size in range(1, lanes + 1) if lanes % size == 0]))
    balance_lanes = data.draw(st.integers(0, 70))
    groups = [rank_group(lanes, balance_lanes, rank, dp_size) for rank in range(dp_size)]
    assert all(rank in group.ranks for rank, group in enumerate(groups))
    assert {lane for group in groups for lane in group.lanes} == set(range(lanes))
    owned = [lane for rank, group in enumerate(groups) for lane in group.own_lanes(rank)]
    assert owned == list(range(lanes))
    assert all(groups[rank] == group for group in groups for rank in group.ranks)


def test_a_source_without_shards_is_refused_by_field() -> None:
    with pytest.raises(UserError, match=r"stage\.joint\.sources names maps, which data\.sources lacks"):
        Planner(small_tables(), plan_settings(sources={"maps": 1.0}))
    with pytest.raises(UserError, match=r"stage\.joint\.sources\.pages is -1"):
        Planner(small_tables(), plan_settings(sources={"pages": -1.0}))


def test_a_scheduled_modality_without_a_source_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"asks for multimodal steps, but stage\.joint\.sources weighs no multi"
    ):
        Planner(small_tables(), plan_settings(sources={"docs": 1.0}))
    with pytest.raises(UserError, match=r"asks for text steps, .* \['pages'\]"):
        Planner(small_tables(), plan_settings(sources={"pages": 1.0, "docs": 0.0}))


def test_a_source_with_an_epoch_limit_gives_way_to_the_others() -> None:
    settings = plan_settings(
        sources={"docs": 1.0, "code": 100.0}, max_epochs={"code": 1}, text_ratio=1.0, packing=False
    )
    [planner] = planners(settings, 1)
    drawn = Counter(unit.source for _ in range(30) for pack in planner.next().packs for unit in pack.units)
    assert drawn["code"] == 40  # its samples, once
    assert drawn["docs"] == 30 * settings.global_batch_size - 40


def test_a_plan_without_sources_left_ends_with_an_error() -> None:
    limits = {"docs": 1, "code": 1}
    settings = plan_settings(sources={"docs": 1.0, "code": 1.0}, max_epochs=limits, text_ratio=1.0)
    [planner] = planners(settings, 1)
    used_up = r"used up its text sources: stage\.joint\.max_epochs allows .*'docs': 1.*Train fewer steps"
    with pytest.raises(UserError, match=used_up):
        list(iter(planner.next, None))
    stands = planner.state()
    with pytest.raises(UserError, match=used_up):  # as every rank of the group will see it
        planner.next()
    assert planner.state() == stands


def test_phases_give_every_step_the_scheduled_share_of_text_rows() -> None:
    settings = plan_settings(
        grouping="phase", text_ratio=0.25, text_warmup_fraction=0.0, global_batch_size=16, balance_lanes=4
    )
    ranks = planners(settings, 2)
    for _ in range(10):
        for plan in (rank.next() for rank in ranks):
            modalities = [MODALITIES[pack.units[0].source] for pack in plan.packs]
            assert modalities == [MULTIMODAL] * 6 + [TEXT] * 2  # images first, on all ranks alike
            assert plan.modality == MIXED


def test_dealing_moves_rows_between_ranks_and_changes_none() -> None:
    one, four = planners(plan_settings(), 4), planners(plan_settings(balance_lanes=4), 4)
    num_moved = 0
    for _ in range(10):
        plain, dealt = [rank.next() for rank in one], [rank.next() for rank in four]
        assert len({plan.digest for plan in dealt}) == 1
        assert len({plan.digest for plan in plain}) == 4
        loads = [
            [sum(map(plan_settings().cost.of, plan.packs)) for plan in plans] for plans in (plain, dealt)
        ]
        assert max(loads[1]) <= max(loads[0])
        assert Counter(p for plan in plain for p in plan.packs) == Counter(
            p for plan in dealt for p in plan.packs
        )
        num_moved += sum(set(a.packs) != set(b.packs) for a, b in zip(plain, dealt, strict=True))
    assert num_moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grouping": "row"}, r"stage\.joint\.grouping=row: must be step or phase"),
        ({"grouping": "phase", "micro_batch_size": 4}, r"micro_batch_size=4 does not divide"),
        ({"flush_steps": 0}, r"data\.flush_steps=0: must be at least 1"),
        ({"max_epochs": {"maps": 1}}, r"stage\.joint\.max_epochs\.maps=1: .* for a source with a weight"),
        ({"max_epochs": {"docs": 0}}, r"max_epochs\.docs=0: it must be at least 1"),
    ],
)
def test_settings_that_make_no_plan_are_refused_by_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_settings(**changes)


def test_lanes_are_flushed_one_after_the_other() -> None:
    settings = plan_settings(text_ratio=1.0, flush_steps=LANES, global_batch_size=4)
    [planner] = planners(settings, 1)
    for step in range(12):
        planner.next()
        empty = [lane.lane for lane in planner.state().lanes if not lane.waiting[TEXT]]
        assert (LANES - 1 - step) % LANES in empty
        assert len(empty) < LANES or step < LANES
