"""Units timed on the ranks of a benchmark, and steps simulated with those times."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.calibrate import open_bench
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.machine import Device
from megatron_vl.measure.calibrate import fit_unit
from megatron_vl.measure.timing import Timed, time_units
from megatron_vl.parallel.groups import destroy_groups
from megatron_vl.planning.calibration import Calibration, CalibrationKey, add_calibration
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.steps import StepReplay, Steps
from megatron_vl.planning.workload import stage_workload
from megatron_vl.train.settings import resolve_stages

UnitTimes = dict[str, list[Timed]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On one rank: what its units took, and what they follow."""

    times: UnitTimes
    drivers: dict[str, tuple[str, ...]]


def time_here(config: PretrainConfig, rounds: int) -> Measured:
    """CPU seconds of the model's units on this rank, beside the other ranks. Collective; leaves no groups behind."""
    bench, _ = open_bench(config, Device("cpu"))
    units = bench.units()
    times = time_units(units, time.process_time, rounds)
    destroy_groups()
    return Measured(times=times, drivers={name: unit.drivers for name, unit in units.items()})


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
        update=0.0,
    )


def simulate(
    config: PretrainConfig, calibration: Calibration, images: NDArray[np.float64], world_size: int
) -> StepReplay:
    """The step of one replica whose microbatches have `images` [M]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        add_calibration(path, calibration)
        steps = steps_of(replace(config, cluster=replace(config.cluster, calibration=str(path))), world_size)
        chunks = parse_layout(steps.setting.layout)
        splits = np.array([[chunk.count("t")] for chunk in chunks])
        return steps.replay(images[:, None].astype(np.float64), splits)


def steps_of(config: PretrainConfig, world_size: int) -> Steps:
    """The simulator for a run's one stage, as it would train on `world_size` ranks."""
    (settings,) = resolve_stages(config, world_size)
    parallel = settings.parallel
    setting = Setting(
        topology=settings.topology,
        layout=settings.layout,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=settings.values.micro_batch_size,
        recompute=config.recompute.language,
        recompute_vision=config.recompute.vision,
        vision_placement=parallel.vision_placement,
    )
    workload = stage_workload(settings.name, settings.values, config.data.max_images_per_pack)
    return Steps(
        model=config.model,
        workload=workload,
        setting=setting,
        cluster=config.cluster,
        precision=config.train.precision,
    )


def busiest(replayed: StepReplay) -> float:
    """CPU seconds of the busiest rank in the one case that was replayed: its passes, its encoding, its update."""
    beside_pipeline = replayed.seconds - replayed.pipeline.seconds
    return float((replayed.pipeline.busy.max(0) + beside_pipeline)[0])
