"""A saved plan goes on as if uninterrupted, at any data-parallel size; one that changed is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_change import check_resumable, restart_sources
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.plan_state import PlanState, merge_states
from tests.support.plans import SETTINGS, plan_settings, planners, small_tables, step_packs, through_json


@hypothesis_settings(max_examples=25)
@given(settings=SETTINGS, saved_at=st.integers(0, 30), before=st.sampled_from([1, 2, 4]), data=st.data())
def test_resume_continues_the_identical_plan_at_any_data_parallel_size(
    settings: PlanSettings, saved_at: int, before: int, data: st.DataObject
) -> None:
    after = data.draw(st.sampled_from([1, 2, 4]))
    uninterrupted = planners(settings, before)
    for _ in range(saved_at):
        step_packs(uninterrupted)
    state = through_json(uninterrupted)
    expected = [step_packs(uninterrupted) for _ in range(10)]
    resumed = planners(settings, after)
    for rank in resumed:
        rank.restore(state)
    assert [step_packs(resumed) for _ in range(10)] == expected
    assert through_json(resumed) == through_json(uninterrupted)


def test_a_state_in_hand_does_not_change_as_planning_goes_on() -> None:
    [planner] = planners(plan_settings(), 1)
    planner.next()
    state = planner.state()
    before = json.dumps(state.to_json())
    for _ in range(10):
        planner.next()
    assert json.dumps(state.to_json()) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "run.seed was 1234 and is 1"),
        ({"global_batch_size": 12}, "stage.joint.global_batch_size was 8 and is 12"),
        ({"lanes": 2}, "lanes (data.lanes and the global batch) was 4 and is 2"),
        ({"sequence_length": 256}, "stage.joint.sequence_length was 128 and is 256"),
        ({"text_ratio": 0.7}, "stage.joint.text_ratio was 0.5 and is 0.7"),
        ({"text_warmup_fraction": 0.2}, "stage.joint.text_warmup_fraction x steps was 10 and is 20"),
        ({"packing_window": 13}, "data.packing_window was 12 and is 13"),
        (
            {"sources": {"pages": 1.0, "figures": 2.0, "docs": 1.0, "code": 4.0}},
            "sources.code was 3.0 and is 4.0",
        ),
    ],
)
def test_resume_with_a_changed_value_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    [saved] = planners(plan_settings(), 1)
    [changed] = planners(plan_settings(**changes), 1)
    with pytest.raises(UserError) as refused:
        changed.restore(through_json([saved]))
    message = str(refused.value)
    assert named in message
    assert message.count(" was ") == 1  # and nothing that did not change


def test_a_resumed_plan_deals_by_the_costs_that_it_was_saved_with() -> None:
    """Another pipeline layout has other costs; the rows of a rank do not change for that."""
    dear = RowCost(per_token=0, per_image=1, per_pair=0)
    first, second = planners(plan_settings(balance_lanes=4, cost=dear), 2)
    for rank in (first, second):
        rank.next()
    other = Planner(small_tables(), plan_settings(balance_lanes=4), 0, 2)
    other.restore(merge_states([first.state(), second.state()]))
    assert [other.next() for _ in range(6)] == [first.next() for _ in range(6)]
    plain = Planner(small_tables(), plan_settings(balance_lanes=4), 0, 2)
    assert [plain.next() for _ in range(7)][1:] != [other.next() for _ in range(6)]


def test_resume_with_changed_data_names_the_source() -> None:
    tables = small_tables()
    state = through_json([Planner(tables, plan_settings())])
    tables["code"] = replace(tables["code"], digest="another")
    with pytest.raises(UserError, match=r"data\.sources\.code .* was digest of code and is another"):
        Planner(tables, plan_settings()).restore(state)
    with pytest.raises(UserError, match=r"data\.sources\.docs was absent and is 1"):
        check_resumable({}, {"data.sources.docs": 1})


def test_more_steps_do_not_change_a_plan_without_warmup() -> None:
    [saved] = planners(plan_settings(text_warmup_fraction=0.0), 1)
    [longer] = planners(plan_settings(text_warmup_fraction=0.0, num_steps=200), 1)
    longer.restore(through_json([saved]))
    assert step_packs([longer]) == step_packs([saved])


def test_states_that_do_not_belong_together_are_refused() -> None:
    first, second = planners(plan_settings(), 2)
    first.next()
    with pytest.raises(ValueError, match="steps 1 and 0 do not belong together"):
        merge_states([first.state(), second.state()])
    with pytest.raises(ValueError, match=r"lacks lanes \[2, 3\]"):
        second.restore(first.state())
    with pytest.raises(UserError, match="version 99"):
        PlanState.from_json({**first.state().to_json(), "version": 99})


def test_a_changed_source_begins_anew_and_the_others_go_on() -> None:
    tables = small_tables()
    planner = Planner(tables, plan_settings())
    for _ in range(6):
        planner.next()
    saved = planner.state()
    tables["code"] = replace(tables["code"], digest="another")
    changed = Planner(tables, plan_settings())
    state, told = restart_sources(saved, changed.fingerprint, changed.state().lanes)
    assert told == [
        "data.sources.code (digest of its index) was digest of code and is another",
        "source code begins anew",
    ]
    for before, after in zip(saved.lanes, state.lanes, strict=True):
        assert after.cursors["code"] == (0, 0, 0) != before.cursors["code"]
        assert {name: after.cursors[name] for name in ("pages", "figures", "docs")} == {
            name: before.cursors[name] for name in ("pages", "figures", "docs")
        }
        kept = {w.unit for pool in before.waiting.values() for w in pool if w.unit.source != "code"}
        assert {w.unit for pool in after.waiting.values() for w in pool} == kept
    changed.restore(state)
    assert changed.next().step == 7


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sources": {"pages": 1.0, "docs": 1.0}}, "source figures ends"),
        (
            {"sources": {"pages": 1.0, "figures": 2.0, "docs": 2.0, "code": 3.0}},
            "sources.docs was 1.0 and is 2.0",
        ),
        ({"seed": 5}, "all sources begin anew"),
        ({"text_ratio": 0.2}, "text_ratio was 0.5 and is 0.2"),
        ({"lanes": 2}, "all sources begin anew"),
    ],
)
def test_a_changed_mixture_takes_effect_where_sources_may_restart(
    changes: dict[str, object], told: str
) -> None:
    planner = Planner(small_tables(), plan_settings())
    for _ in range(6):
        planner.next()
    changed = Planner(small_tables(), plan_settings(**changes))
    state, said = restart_sources(planner.state(), changed.fingerprint, changed.state().lanes)
    assert any(told in line for line in said)
    changed.restore(state)
    assert changed.next().step == 7


def test_another_global_batch_is_refused_all_the_same() -> None:
    saved, changed = planners(plan_settings(), 1)[0], planners(plan_settings(global_batch_size=12), 1)[0]
    with pytest.raises(UserError, match=r"global_batch_size was 8 and is 12\. Restore it"):
        restart_sources(saved.state(), changed.fingerprint, changed.state().lanes)
