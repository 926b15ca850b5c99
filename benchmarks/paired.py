"""Sides of a comparison measured in turns: CPU and wall time, medians with their spread, ratios of pairs.

A machine's speed drifts, with what its neighbours do and with its heat. Sides that run in turns meet the same drift,
so the ratio of two times of one round is steadier than either time.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Times:
    """Of one side, a value for each round, in seconds. `cpu` counts all threads of this process."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Interval:
    """A median, and what lies around it: quartiles of values, or the confidence interval of a ratio."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def one_thread() -> None:
    """From here on torch computes in one thread, so that CPU time and wall time say the same of an idle machine."""
    torch.set_num_threads(1)


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Call every side once a round, and in the opposite order in every other round; the first `warmup` rounds do not
    count."""
    times = {name: Times() for name in sides}
    for number in range(warmup + rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            cpu, wall = time.process_time(), time.perf_counter()
            sides[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= warmup:
                times[name].cpu.append(cpu)
                times[name].wall.append(wall)
    return times


def quartiles(values: Sequence[float]) -> Interval:
    """The median and the quartiles of at least two values."""
    low, middle, high = quantiles(values, method="inclusive")
    return Interval(middle, low, high)


def paired_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 4000,
) -> Interval:
    """The median of the ratios of values of the same round, with its bootstrap interval (percentiles)."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    generator = random.Random(0)
    medians = sorted(median(generator.choices(ratios, k=len(ratios))) for _ in range(resamples))
    tail = int((1 - confidence) / 2 * resamples)
    return Interval(median(ratios), medians[tail], medians[-1 - tail])
