"""Which losses are spikes, what is given up, and where a run goes back to."""

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.checkpoint import state as run_state
from megatron_vl.config.errors import UserError
from megatron_vl.config.faults import FaultsConfig, check_faults
from megatron_vl.train import rollback
from megatron_vl.train.health import Health, steps_to_give_up
from megatron_vl.train.rollback import Rollback, decide
from megatron_vl.train.stragglers import Straggler, straggler

FAULTS = FaultsConfig(spike_deviations=10.0, spike_window=16)


def healthy(losses: list[float], modality: str = "text") -> Health:
    health = Health()
    for step, loss in enumerate(losses, start=1):
        health.count(step, modality, loss, False, FAULTS)
    return health


def test_a_spike_is_far_above_the_losses_of_its_modality() -> None:
    health = healthy([3.0, 3.1, 2.9, 3.05, 2.95])
    limit = health.max_loss("text", FAULTS)
    assert limit == pytest.approx(3.0 + 10 * 1.4826 * 0.05)
    assert health.max_loss("multimodal", FAULTS) == math.inf
    assert healthy([3.0] * 3).max_loss("text", FAULTS) == math.inf  # of a window of 16, too few to tell
    assert health.max_loss("text", FaultsConfig(spike_deviations=None)) == math.inf


@given(st.lists(st.floats(0.1, 20), min_size=4, max_size=40))
def test_what_was_normal_within_the_window_stays_normal(losses: list[float]) -> None:
    """A source that comes seldom, and has other losses than the rest, is no fault."""
    window = losses[-FAULTS.spike_window :]
    limit = healthy(losses).max_loss("text", FAULTS)
    assert limit >= max(window)
    assert limit > statistics.median(window)


def test_a_resume_judges_as_the_uninterrupted_run() -> None:
    health = healthy([1 / 3, 0.1 + 0.2, 2.0, 1e-3, 5.5])
    health.count(6, "text", math.nan, True, FAULTS)
    health.given_up = [2]
    again = Health.from_json(json.loads(json.dumps(health.to_json())))
    assert again == health
    assert again.max_loss("text", FAULTS) == health.max_loss("text", FAULTS)
    again.count(7, "text", 1.0, False, FAULTS)
    assert again.skipped == [] and again.losses["text"][-1] == 1.0


@given(
    st.integers(1, 20).flatmap(lambda first: st.tuples(st.just(first), st.integers(first, 40))),
    st.integers(1, 6),
    st.sets(st.integers(1, 40)),
    st.integers(0, 12),
)
def test_given_up_are_the_skipped_and_the_nearest_before_them(
    places: tuple[int, int], length: int, earlier: set[int], num_before: int
) -> None:
    first, start = places
    skipped = list(range(start, start + length))
    found = steps_to_give_up(skipped, sorted(earlier), num_before, first)
    before, rest = found[: len(found) - length], found[len(found) - length :]
    assert rest == skipped
    candidates = [step for step in range(first, start) if step not in earlier]
    assert before == sorted(sorted(candidates, reverse=True)[:num_before])


class _Settings:
    name, first_global_step = "joint", 101


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Global steps of the checkpoints that there are."""
    steps: list[int] = []
    states = {
        Path(str(step)): run_state.RunState(
            stage="", step=0, num_steps=0, global_step=step, plan={}, fingerprint={}
        )
        for step in range(200)
    }
    monkeypatch.setattr(rollback, "whole_checkpoints", lambda folder: [Path(str(step)) for step in steps])
    monkeypatch.setattr(rollback, "read_state", states.__getitem__)
    return steps


def test_the_run_goes_back_before_what_was_skipped_and_gives_up_at_last(saved: list[int]) -> None:
    settings: Any = _Settings()
    health = Health(skipped=[7, 8], given_up=[5])
    saved[:] = [100, 104, 107]  # 107 was saved between the two: an interrupt
    seen: list[Rollback] = []
    for _ in range(2):
        seen.append(decide(settings, health, Path(), seen, max_rollbacks=2))
    assert [one.to_global_step for one in seen] == [104, 104]
    assert [one.given_up for one in seen] == [[7, 8], [6, 7, 8]]
    with pytest.raises(UserError, match=r"steps 7 to 8: .*2 times to the checkpoint of global step 104"):
        decide(settings, health, Path(), seen, max_rollbacks=2)
    saved[:] = [100]  # the end of the stage before
    assert decide(settings, health, Path(), seen, max_rollbacks=2).to_global_step == 100
    saved[:] = []
    assert decide(settings, health, Path(), [], max_rollbacks=2).to_global_step == 0


def test_faults_jsonl_brings_decisions_back(tmp_path: Path) -> None:
    one = Rollback(stage="joint", skipped=[7], given_up=[6, 7], to_global_step=4)
    rows = [{"kind": "skipped", "step": 7}, {"kind": "rolled_back", "time": 1.0, **asdict(one)}]
    path = tmp_path / "faults.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "rolled_ba')
    assert rollback._read(path) == [one]
    assert rollback.given_up_in("joint", [one]) == {6, 7}
    assert rollback.given_up_in("sft", [one]) == set()


@pytest.mark.parametrize(
    ("field", "value"),
    [("spike_window", 0), ("skipped_in_a_row", 0), ("spike_deviations", 0.0), ("max_rollbacks", -1)],
)
def test_values_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"train\.faults\.{field}={value}: must be"):
        check_faults(FaultsConfig(**{field: value}))  # type: ignore[arg-type]


def test_the_straggler_is_slow_among_those_that_do_the_same_work() -> None:
    # Two stages of three ranks: the second stage has three times the work of the first.
    assert straggler([1.0, 1.0, 1.5, 3.0, 3.3, 3.0], pipeline_size=2) == Straggler(rank=2, ratio=1.5)
    assert straggler([1.0, 0.0], pipeline_size=1) is None
