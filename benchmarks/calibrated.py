"""Units timed on the ranks of a benchmark, and steps simulated with those times."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from launch.calibrate import open_bench, update
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.machine import Device
from megatron_vl.measure.calibrate import fit_unit, measure_update
from megatron_vl.measure.timing import Timed, time_units, working_clock
from megatron_vl.parallel.groups import destroy_groups
from megatron_vl.planning.calibration import Calibration, CalibrationKey, add_calibration
from megatron_vl.planning.candidate import Candidate
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.steps import StepReplay, Steps
from megatron_vl.train.division import stage_problem, stage_setting
from megatron_vl.train.settings import resolve_stages

UnitTimes = dict[str, list[Timed]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On one rank: what its units took, and what they follow."""

    times: UnitTimes
    drivers: dict[str, tuple[str, ...]]
    per_parameter: float  # seconds of an update


def time_here(config: PretrainConfig, rounds: int) -> Measured:
    """CPU seconds of the model's units on this rank, beside the other ranks. Collective; leaves no groups behind."""
    bench, model = open_bench(config, Device("cpu"))
    units, clock = bench.units(), working_clock()
    times = time_units(units, clock, rounds)
    seconds = measure_update(lambda: update(model), clock, rounds)
    destroy_groups()
    return Measured(
        times=times,
        drivers={name: unit.drivers for name, unit in units.items()},
        per_parameter=seconds / bench.num_parameters,
    )


def calibration_of(config: PretrainConfig, measured: Sequence[Measured]) -> Calibration:
    """Lines through what all of these ranks and moments took."""
    parallel = config.parallel
    drivers = measured[0].drivers
    return Calibration(
        key=CalibrationKey.of(
            config.model, config.train.precision, parallel.tensor_size, parallel.sequence_parallel
        ),
        device="cpu",
        units={
            name: fit_unit([timed for one in measured for timed in one.times[name]], drivers[name])
            for name in drivers
        },
        per_parameter=median(one.per_parameter for one in measured),
    )


@contextmanager
def simulator(config: PretrainConfig, calibration: Calibration, world_size: int) -> Iterator[Steps]:
    """The steps of a run's one stage on `world_size` ranks, timed by `calibration`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        add_calibration(path, calibration)
        yield steps_of(replace(config, cluster=replace(config.cluster, calibration=str(path))), world_size)


def simulate(
    config: PretrainConfig, calibration: Calibration, images: NDArray[np.float64], world_size: int
) -> StepReplay:
    """The step of one replica whose microbatches have `images` [M]."""
    with simulator(config, calibration, world_size) as steps:
        splits = np.array([[chunk.count("t")] for chunk in parse_layout(steps.setting.layout)])
        return steps.replay(images[:, None].astype(np.float64), splits)


def steps_of(config: PretrainConfig, world_size: int) -> Steps:
    """The simulator for a run's one stage, as it would train on `world_size` ranks."""
    (stage,) = resolve_stages(config, world_size)
    problem = stage_problem(config, stage.name, stage.values)
    setting = stage_setting(config, stage.values, stage.parallel, stage.topology, stage.layout)
    return Candidate(problem, setting).steps


def busiest(replayed: StepReplay) -> float:
    """CPU seconds of the busiest rank in the one case that was replayed: its passes, its encoding, its update."""
    beside_pipeline = replayed.seconds - replayed.pipeline.seconds
    return float((replayed.pipeline.busy.max(0) + beside_pipeline)[0])
