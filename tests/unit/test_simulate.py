"""Simulated times: every pass once, causes before effects, never faster than they can be, as textbooks say."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.planning.schedule import Pass, Schedule, interleaves, smallest_group
from megatron_vl.planning.simulate import Replay, case_of, replay


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    pipeline = draw(st.integers(1, 4))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    count = draw(st.integers(1, 10)) if virtual == 1 else pipeline * draw(st.integers(1, 3))
    groups = [n for n in range(pipeline, count + 1) if interleaves(count, pipeline, n)]
    group = draw(st.sampled_from(groups)) if virtual > 1 else 0
    return Schedule(pipeline_size=pipeline, virtual_size=virtual, num_microbatches=count, group_size=group)


@st.composite
def replays(draw: st.DrawFn) -> tuple[Replay, np.ndarray, float]:
    schedule = draw(schedules())
    shape = (2, schedule.num_chunks, schedule.num_microbatches, 2)
    seconds = np.random.default_rng(draw(st.integers(0, 99))).uniform(0.1, 2.0, shape)
    message = draw(st.sampled_from([0.0, 0.3]))
    return replay(schedule, seconds, message), seconds, message


@given(schedules())
def test_every_pass_runs_once_and_backward_after_forward(schedule: Schedule) -> None:
    for rank in range(schedule.pipeline_size):
        passes = schedule.passes(rank)
        assert passes == [action for action in schedule.program(rank) if isinstance(action, Pass)]
        chunks = range(rank, schedule.num_chunks, schedule.pipeline_size)
        expected = {
            Pass(kind, chunk, microbatch)
            for kind in ("forward", "backward")
            for chunk in chunks
            for microbatch in range(schedule.num_microbatches)
        }
        assert len(passes) == len(expected) and set(passes) == expected
        places = {one: place for place, one in enumerate(passes)}
        assert all(
            places[Pass("forward", one.chunk, one.microbatch)] < place
            for one, place in places.items()
            if one.kind == "backward"
        )


@given(replays())
def test_a_pass_waits_for_its_input_and_its_rank(case: tuple[Replay, np.ndarray, float]) -> None:
    result, seconds, message = case
    (forward, backward), (forwarded, backwarded) = result.starts, result.ends
    np.testing.assert_allclose(result.ends - result.starts, seconds)
    assert (forward[1:] >= forwarded[:-1] + message - 1e-9).all()
    assert (backward[:-1] >= backwarded[1:] + message - 1e-9).all()
    assert (backward[-1] >= forwarded[-1] - 1e-9).all()
    for spans in result.spans(case=1):
        assert all(after.start >= before.end - 1e-9 for before, after in pairwise(spans))


@given(replays())
def test_no_step_is_faster_than_its_critical_path_or_its_busiest_rank(
    case: tuple[Replay, np.ndarray, float],
) -> None:
    result, seconds, message = case
    schedule = result.schedule
    hops = 2 * (schedule.num_chunks - 1) * message
    through = seconds.sum((0, 1)).max(0) + hops  # one microbatch forward and back
    assert (result.seconds >= through - 1e-9).all()
    for rank in range(schedule.pipeline_size):
        busy = seconds[:, rank :: schedule.pipeline_size].sum((0, 1, 2))
        np.testing.assert_allclose(result.busy[rank], busy)
        assert (result.seconds >= busy - 1e-9).all()
    assert (result.bubble_fraction >= -1e-9).all() and (result.bubble_fraction < 1).all()


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_equal_passes_give_the_textbook_bubble(
    pipeline: int, virtual: int, rounds: int, forward: float, backward: float
) -> None:
    virtual = virtual if pipeline > 1 else 1
    schedule = Schedule(pipeline_size=pipeline, virtual_size=virtual, num_microbatches=pipeline * rounds)
    chunks = schedule.num_chunks
    result = replay(schedule, case_of([forward] * chunks, [backward] * chunks, pipeline * rounds))
    idle = (pipeline - 1) / (virtual * pipeline * rounds)
    assert result.seconds[0] / result.busy[0, 0] - 1 == pytest.approx(idle, abs=1e-9)


def test_1f1b_by_hand() -> None:
    """Two ranks, three microbatches; forward 1, backward 2, the last rank's twice that; messages 0.5."""
    schedule = Schedule(pipeline_size=2, virtual_size=1, num_microbatches=3)
    result = replay(schedule, case_of([1, 2], [2, 4], 3), 0.5)
    spans = [[(span.kind[0], span.microbatch, span.start) for span in rank] for rank in result.spans()]
    # The first rank's second output leaves when the last rank hands back the first gradient, not before.
    assert spans[0] == [
        ("f", 0, 0), ("f", 1, 1.5), ("b", 0, 8), ("f", 2, 10), ("b", 1, 14.5), ("b", 2, 21)
    ]  # fmt: skip
    assert spans[1] == [
        ("f", 0, 1.5), ("b", 0, 3.5), ("f", 1, 8), ("b", 1, 10), ("f", 2, 14.5), ("b", 2, 16.5)
    ]  # fmt: skip
    assert result.seconds[0] == 23


def test_interleaving_hides_messages() -> None:
    """Where 1F1B waits for every message, the interleaved steady phase does not."""
    times = {}
    for virtual in (1, 2):
        schedule = Schedule(pipeline_size=2, virtual_size=virtual, num_microbatches=16)
        chunks = schedule.num_chunks
        case = case_of([1 / virtual] * chunks, [2 / virtual] * chunks, 16)
        times[virtual] = [replay(schedule, case, message).seconds[0] for message in (0.0, 0.1)]
    assert times[1][1] - times[1][0] > 1.6
    assert times[2][1] - times[2][0] < 0.7


@pytest.mark.parametrize(("count", "group"), [(3, 0), (9, 4), (13, 5), (4, 5)])
def test_what_megatron_core_does_not_interleave_is_refused(count: int, group: int) -> None:
    with pytest.raises(UserError, match="cannot be interleaved"):
        Schedule(pipeline_size=4, virtual_size=2, num_microbatches=count, group_size=group)


def test_the_smallest_group_is_the_pipeline_size_where_that_divides() -> None:
    assert [smallest_group(count, 4) for count in (4, 8, 9, 10, 11, 13, 18)] == [4, 4, 5, 5, 6, 7, 6]


def test_a_program_that_waits_for_ever_is_a_bug() -> None:
    class Broken(Schedule):
        def program(self, rank: int) -> list:
            return super().program(rank)[rank:]  # the last rank never asks for its first input

    schedule = Broken(pipeline_size=2, virtual_size=1, num_microbatches=2)
    with pytest.raises(RuntimeError, match="stuck"):
        replay(schedule, case_of([1, 1], [1, 1], 2))
