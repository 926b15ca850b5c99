"""Measuring in turns: the order of calls, what counts, medians and intervals against values known beforehand."""

import random
import time

from benchmarks.paired import in_turns, paired_ratio, quartiles


def test_sides_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_rounds_of_warmup_are_left_out_and_waiting_takes_no_cpu() -> None:
    times = in_turns({"wait": lambda: time.sleep(0.02)}, rounds=4, warmup=2)["wait"]
    assert len(times.cpu) == len(times.wall) == 4
    assert min(times.wall) >= 0.02 > max(times.cpu)


def test_quartiles_of_known_values() -> None:
    interval = quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (interval.low, interval.median, interval.high) == (2.0, 3.0, 4.0)


def test_drift_that_both_sides_share_leaves_the_ratio_alone() -> None:
    speed = [1.0, 3.0, 0.5, 7.0, 2.0]
    interval = paired_ratio([2 * value for value in speed], speed)
    assert interval.low == interval.median == interval.high == 2.0


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = random.Random(1)
    held = 0
    for _ in range(100):
        noisy = [1.1 * generator.lognormvariate(0, 0.1) for _ in range(25)]
        interval = paired_ratio(noisy, [1.0] * 25, resamples=400)
        held += interval.low <= 1.1 <= interval.high
    assert 88 <= held <= 100
