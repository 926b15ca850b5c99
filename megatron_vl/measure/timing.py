"""Seconds that units of a model take on the present device, forward and backward, for given loads.

All units take turns, round by round, so that a machine's drift meets them alike; medians over the rounds count.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

from megatron_vl.device.machine import Device
from megatron_vl.planning.workload import Load


@dataclass(frozen=True, kw_only=True)
class TimedUnit:
    """`prepare` turns a load into a call over fixed inputs. `num_modules` equal modules share what is measured."""

    module: nn.Module
    loads: tuple[Load, ...]
    prepare: Callable[[Load], Callable[[], Tensor]]
    num_modules: int = 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds for one load: forward, backward to the input alone, backward to the weights as well."""

    load: Load
    forward: float
    input_backward: float
    whole_backward: float


def clock_of(device: Device) -> Callable[[], float]:
    """Seconds that this rank computes: CPU time where it has one thread, which leaves out what other processes take;
    elsewhere wall time, once the device has done all its work."""
    if device.kind == "cpu" and torch.get_num_threads() == 1:
        return process_time

    def wall() -> float:
        device.synchronize()
        return perf_counter()

    return wall


def time_units(
    units: Mapping[str, TimedUnit],
    clock: Callable[[], float],
    rounds: int,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Timed]]:
    """Every unit for each of its loads. A first round warms up; `told` hears of every round that has ended."""
    buffers = {name: _gradient_buffers(unit.module) for name, unit in units.items()}
    seen: dict[tuple[str, int], list[tuple[float, float, float]]] = {
        (name, index): [] for name, unit in units.items() for index in range(len(unit.loads))
    }
    for number in range(rounds + 1):
        for (name, index), seconds in seen.items():
            once = _time_once(units[name], index, buffers[name], clock)
            if number > 0:
                seconds.append(once)
        told(number)
    return {
        name: [_median(unit, index, seen[name, index]) for index in range(len(unit.loads))]
        for name, unit in units.items()
    }


def _time_once(
    unit: TimedUnit, index: int, buffers: Mapping[nn.Parameter, Tensor], clock: Callable[[], float]
) -> tuple[float, float, float]:
    call = unit.prepare(unit.loads[index])
    forwards, backwards = [], []
    for trains in (False, True):
        with _weights_train(buffers, trains):
            start = clock()
            output = call()
            middle = clock()
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            end = clock()
        forwards.append(middle - start)
        backwards.append(end - middle)
    return min(forwards), backwards[0], backwards[1]


def _gradient_buffers(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in module.parameters()}


@contextmanager
def _weights_train(buffers: Mapping[nn.Parameter, Tensor], trains: bool) -> Iterator[None]:
    """Gradients of weights are added up in fp32, as megatron-core's DistributedDataParallel does."""

    def accumulate(parameter: Tensor) -> None:
        if parameter.grad is not None:
            buffers[parameter].add_(parameter.grad)  # type: ignore[index]
            parameter.grad = None

    handles = []
    for parameter in buffers:
        parameter.requires_grad_(trains)
        if trains:
            handles.append(parameter.register_post_accumulate_grad_hook(accumulate))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _median(unit: TimedUnit, index: int, seconds: list[tuple[float, float, float]]) -> Timed:
    forward, input_backward, whole_backward = (
        median(column) / unit.num_modules for column in zip(*seconds, strict=True)
    )
    return Timed(
        load=unit.loads[index], forward=forward, input_backward=input_backward, whole_backward=whole_backward
    )
