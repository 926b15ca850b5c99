"""The scheduled text ratio, the realised modality and the choice of sources keep to their targets exactly."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.mixture import (
    MILLION,
    TextSchedule,
    book_draw,
    next_text_rows,
    pick_source,
    sample_weights,
)
from megatron_vl.data.types import MULTIMODAL, TEXT

RATIOS = st.one_of(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.floats(0, 1))
STEPS = st.integers(1, 400)


def realised(schedule: TextSchedule, num_steps: int) -> list[str]:
    """With steps of one modality."""
    return [TEXT if rows else MULTIMODAL for rows in text_rows(schedule, num_steps, num_rows=9, quantum=9)]


def text_rows(schedule: TextSchedule, num_steps: int, num_rows: int, quantum: int) -> list[int]:
    deficit, rows = 0, []
    for step in range(1, num_steps + 1):
        num_text, deficit = next_text_rows(deficit, schedule.at(step), num_rows, quantum)
        rows.append(num_text)
    return rows


def schedule(num_steps: int, text_ratio: float, warmup_fraction: float) -> TextSchedule:
    return TextSchedule.of_stage("joint", num_steps, text_ratio, warmup_fraction)


@given(num_steps=STEPS, text_ratio=RATIOS, warmup_fraction=RATIOS)
def test_cumulative_text_ratio_stays_within_one_global_batch(
    num_steps: int, text_ratio: float, warmup_fraction: float
) -> None:
    plan = schedule(num_steps, text_ratio, warmup_fraction)
    assert plan.warmup_steps == pytest.approx(warmup_fraction * num_steps, abs=0.5001)
    num_text, scheduled = 0, 0.0
    for step, modality in enumerate(realised(plan, num_steps), start=1):
        # The same line, computed in floats from the definition.
        fallen = min(1.0, (step - 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
        scheduled += 1 - (1 - text_ratio) * fallen
        num_text += modality == TEXT
        assert abs(num_text - scheduled) < 0.51  # promised: 1


@given(num_steps=STEPS, text_ratio=RATIOS, warmup_fraction=RATIOS)
def test_schedule_falls_from_all_text_to_its_ratio(
    num_steps: int, text_ratio: float, warmup_fraction: float
) -> None:
    plan = schedule(num_steps, text_ratio, warmup_fraction)
    shares = [plan.at(step) for step in range(1, num_steps + 2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(text_ratio * MILLION, abs=0.5)
    assert shares[0] == (MILLION if plan.warmup_steps else shares[-1])


def test_schedule_is_linear() -> None:
    plan = schedule(100, 0.7, 0.1)
    assert [plan.at(step) for step in (1, 2, 6, 11, 100)] == [1_000_000, 970_000, 850_000, 700_000, 700_000]


def test_extreme_ratios_train_one_modality_only() -> None:
    assert set(realised(schedule(50, 0.0, 0.0), 50)) == {MULTIMODAL}
    assert set(realised(schedule(50, 1.0, 0.0), 50)) == {TEXT}


@given(num_steps=STEPS, text_ratio=RATIOS, quantum=st.sampled_from([1, 2, 4, 12]))
def test_phases_keep_to_the_schedule_within_a_quantum(
    num_steps: int, text_ratio: float, quantum: int
) -> None:
    given_rows, scheduled = 0, 0.0
    for num_text in text_rows(schedule(num_steps, text_ratio, 0.0), num_steps, 12, quantum):
        given_rows, scheduled = given_rows + num_text, scheduled + 12 * text_ratio
        assert num_text % quantum == 0
        assert 0 <= num_text <= 12
        assert abs(given_rows - scheduled) <= quantum / 2 + 1e-3 * num_steps


def test_even_ratio_alternates() -> None:
    assert realised(schedule(8, 0.5, 0.0), 8) == [TEXT, MULTIMODAL] * 4


@given(num_steps=STEPS, text_ratio=RATIOS, warmup_fraction=RATIOS)
def test_every_realised_modality_was_announced(
    num_steps: int, text_ratio: float, warmup_fraction: float
) -> None:
    plan = schedule(num_steps, text_ratio, warmup_fraction)
    assert set(realised(plan, num_steps)) <= set(plan.modalities(num_steps))


def test_one_sided_schedules_announce_one_modality() -> None:
    assert schedule(10, 0.0, 0.0).modalities(10) == (MULTIMODAL,)
    assert schedule(10, 1.0, 0.5).modalities(10) == (TEXT,)
    assert schedule(10, 0.0, 0.1).modalities(10) == (TEXT, MULTIMODAL)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_ratios_outside_their_range_are_refused_by_name(value: float) -> None:
    with pytest.raises(UserError, match=r"stage\.joint\.text_ratio is .*between 0 and 1"):
        schedule(10, value, 0.0)
    with pytest.raises(UserError, match=r"stage\.joint\.text_warmup_fraction is .*between 0 and 1"):
        schedule(10, 0.7, value)


WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1000), min_size=1, max_size=6)


@given(weights=WEIGHTS, num_draws=st.integers(1, 300))
def test_draws_follow_the_weights(weights: dict[str, float], num_draws: int) -> None:
    shares = sample_weights(weights)
    credits, counts = dict.fromkeys(shares, 0), dict.fromkeys(shares, 0)
    most_behind = sum(1 / k for k in range(1, len(weights) + 1))  # of a game of emptying the fullest cup
    for draw in range(1, num_draws + 1):
        chosen = pick_source(credits, shares)
        book_draw(credits, shares, chosen, num_pieces=1)
        counts[chosen] += 1
        for name, weight in shares.items():
            due = Fraction(draw * weight, sum(shares.values()))
            assert counts[name] - 1 < due < counts[name] + most_behind
    assert sum(credits.values()) == 0


@given(weights=WEIGHTS)
def test_weights_are_relative_and_their_order_does_not_matter(weights: dict[str, float]) -> None:
    shuffled = dict(reversed(weights.items()))
    assert list(sample_weights(weights).items()) == list(sample_weights(shuffled).items())
    doubled = {name: 2 * weight for name, weight in weights.items()}
    assert sample_weights(weights) == sample_weights(doubled)


def test_sources_of_long_documents_are_drawn_more_often() -> None:
    """Weights are by samples: of 1 : 3, ten pieces a book, 10 pieces to 3 notes."""
    shares, pieces = sample_weights({"books": 1.0, "notes": 3.0}), {"books": 10, "notes": 1}
    credits, counts = dict.fromkeys(shares, 0), dict.fromkeys(shares, 0)
    for _ in range(1300):
        chosen = pick_source(credits, shares)
        book_draw(credits, shares, chosen, pieces[chosen])
        counts[chosen] += 1
    assert counts["books"] == pytest.approx(1000, abs=10)


@given(weights=WEIGHTS, num_pieces=st.integers(1, 50))
def test_a_draw_taken_back_leaves_no_trace(weights: dict[str, float], num_pieces: int) -> None:
    shares = sample_weights(weights)
    credits = dict.fromkeys(shares, 7)
    chosen = pick_source(credits, shares)
    book_draw(credits, shares, chosen, num_pieces)
    book_draw(credits, shares, chosen, num_pieces, sign=-1)
    assert set(credits.values()) == {7}
