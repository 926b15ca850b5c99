"""Seconds that units of a model take on the present device, forward and backward, for given loads.

All units take turns, round by round, so that a machine's drift meets them alike; medians over the rounds count.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time, sleep

import torch
from torch import Tensor, nn

from megatron_vl.device.machine import Device
from megatron_vl.planning.workload import Load

IDLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TimedUnit:
    """`prepare` turns a load into a call over fixed inputs. `num_modules` equal modules share what is measured.
    `drivers` are the load's fields that the time follows.

    Where `module` is part of a model that is wrapped for data parallelism, adding its gradients up is measured too.
    """

    module: nn.Module
    loads: tuple[Load, ...]
    prepare: Callable[[Load], Callable[[], Tensor]]
    drivers: tuple[str, ...]
    num_modules: int = 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds for one load: forward, backward to the input alone, backward to the weights as well."""

    load: Load
    forward: float
    input_backward: float
    whole_backward: float


def clock_of(device: Device) -> Callable[[], float]:
    """Seconds that this rank works: CPU time where it computes in one thread, which leaves out what other processes
    take; elsewhere wall time, once the device has done all its work."""
    if device.kind == "cpu" and torch.get_num_threads() == 1:
        return working_clock()

    def wall() -> float:
        device.synchronize()
        return perf_counter()

    return wall


def working_clock() -> Callable[[], float]:
    """CPU seconds of this process beyond those that it takes while it waits. Collectives are ready: gloo has a thread
    for each process group that looks for messages a hundred times a second, which is 3 % of a core for a rank."""
    cpu, begun = process_time(), perf_counter()
    sleep(IDLE_SECONDS)
    idle_share = (process_time() - cpu) / (perf_counter() - begun)
    return lambda: process_time() - idle_share * perf_counter()


def time_units(
    units: Mapping[str, TimedUnit],
    clock: Callable[[], float],
    rounds: int,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Timed]]:
    """Every unit for each of its loads. A first round warms up; `told` hears of every round that has ended."""
    seen: dict[tuple[str, int], list[tuple[float, float, float]]] = {
        (name, index): [] for name, unit in units.items() for index in range(len(unit.loads))
    }
    for number in range(rounds + 1):
        for (name, index), seconds in seen.items():
            once = _time_once(units[name], index, clock)
            if number > 0:
                seconds.append(once)
        told(number)
    return {
        name: [_median(unit, index, seen[name, index]) for index in range(len(unit.loads))]
        for name, unit in units.items()
    }


def _time_once(unit: TimedUnit, index: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    call = unit.prepare(unit.loads[index])
    forwards, backwards = [], []
    for trains in (False, True):
        with _weights_train(unit.module, trains):
            start = clock()
            output = call()
            middle = clock()
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            end = clock()
        forwards.append(middle - start)
        backwards.append(end - middle)
    return sum(forwards) / 2, backwards[0], backwards[1]


@contextmanager
def _weights_train(module: nn.Module, trains: bool) -> Iterator[None]:
    """Whether the module's weights get gradients; they all did before, and do afterwards."""
    module.requires_grad_(trains)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _median(unit: TimedUnit, index: int, seconds: list[tuple[float, float, float]]) -> Timed:
    forward, input_backward, whole_backward = (
        median(column) / unit.num_modules for column in zip(*seconds, strict=True)
    )
    return Timed(
        load=unit.loads[index], forward=forward, input_backward=input_backward, whole_backward=whole_backward
    )
