"""Steps of a small model as it grows: CPU seconds and bytes on ranks of this machine, beside what planning says.

The ranks time the model's units before and after each point's steps, so the prediction shares their moment and their
rows; it knows nothing of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.calibrated import Measured, busiest, calibration_of, simulate, time_here
from benchmarks.workbench import build_side, composed
from megatron_vl.config.root import PretrainConfig
from megatron_vl.measure.memory_count import LiveStorages
from megatron_vl.parallel.groups import destroy_groups
from megatron_vl.planning.memory import peak_bytes
from megatron_vl.planning.topology import Topology
from megatron_vl.train.division import stage_problem, stage_setting
from megatron_vl.train.settings import resolve_stages
from tests.support.ranks import run_ranks

ROUNDS, STEPS = 2, 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on a curve: rows of a replica's step with `images` each."""

    at: int
    images: tuple[int, ...] = (2, 2)
    overrides: tuple[str, ...] = ()
    pipeline_size: int = 1
    data_size: int = 1

    @property
    def world_size(self) -> int:
        return self.pipeline_size * self.data_size

    def config(self) -> PretrainConfig:
        batch = len(self.images) * self.data_size
        sizes = (f"parallel.pipeline_size={self.pipeline_size}", f"train.global_batch_size={batch}")
        return composed(*sizes, *self.overrides)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What grows, in `unit`, while all else stays."""

    name: str
    unit: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Figures:
    """A step of the busiest rank: CPU seconds, and the most bytes that any rank held."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    at: int
    measured: Figures
    simulated: Figures


@dataclass(frozen=True)
class Taken:
    """On one rank."""

    figures: Figures
    units: tuple[Measured, Measured]


LAYERS = Curve(
    name="decoder layers",
    unit="layers",
    points=tuple(Point(at=n, overrides=(f"model.language.num_layers={n}",)) for n in (4, 8, 12, 16)),
)
IMAGES = Curve(
    name="images",
    unit="images in each row",
    points=tuple(Point(at=n, images=(n, n)) for n in (1, 3, 6, 12)),
)
SEQUENCE = Curve(
    name="sequence",
    unit="tokens of a row",
    points=tuple(
        Point(at=n, overrides=(f"stage.joint.sequence_length={n}",)) for n in (256, 512, 1024, 2048)
    ),
)
RANKS = Curve(
    name="ranks",
    unit="ranks for 8 rows",
    points=(
        Point(at=1, images=(2,) * 8),
        Point(at=2, images=(2,) * 8, pipeline_size=2),
        Point(at=4, images=(2,) * 8, pipeline_size=4),
        Point(at=8, images=(2,) * 4, pipeline_size=4, data_size=2),
    ),
)
CURVES = (LAYERS, IMAGES, SEQUENCE, RANKS)


def compare(curve: Curve) -> list[Compared]:
    """Points of one number of ranks are measured one after another."""
    found: list[Compared] = []
    for world_size in sorted({point.world_size for point in curve.points}):
        points = [point for point in curve.points if point.world_size == world_size]
        by_rank = run_ranks(world_size, measure, points, timeout_seconds=500)
        for point, taken in zip(points, zip(*by_rank, strict=True), strict=True):
            measured = Figures(
                max(one.figures.seconds for one in taken), max(one.figures.peak_bytes for one in taken)
            )
            simulated = predict(point, [units for one in taken for units in one.units])
            found.append(Compared(at=point.at, measured=measured, simulated=simulated))
    return found


def measure(points: Sequence[Point]) -> list[Taken]:
    """On one rank: each point's steps, and times of the model's units before and after them."""
    taken = []
    for point in points:
        config = point.config()
        before = time_here(config, ROUNDS)
        taken.append(Taken(_step(point), (before, time_here(config, ROUNDS))))
    return taken


def _step(point: Point) -> Figures:
    """The median of some steps' seconds. Bytes are those of a step of their own, since counting takes time."""
    live = LiveStorages()
    with live:
        side = build_side(point.config())
    rows = side.microbatches(point.images)
    live.leave_out(tensor for row in rows for tensor in vars(row).values() if torch.is_tensor(tensor))
    with live:
        for _ in range(2):  # the first makes Adam's means
            live.restart_peak()
            side.step(rows)
    seconds = median(side.step(rows).cpu for _ in range(STEPS))
    dist.barrier()
    destroy_groups()
    return Figures(seconds, live.peak_bytes)


def predict(point: Point, units: Sequence[Measured]) -> Figures:
    """From the seconds of units; bytes from the model's sizes alone."""
    config = point.config()
    images = np.array(point.images, dtype=np.float64)
    replayed = simulate(config, calibration_of(config, units), images, point.world_size)
    return Figures(busiest(replayed), _peak_bytes(point, config))


def _peak_bytes(point: Point, config: PretrainConfig) -> int:
    (stage,) = resolve_stages(config, point.world_size)
    problem = stage_problem(config, stage.name, stage.values)
    topology = Topology(world_size=point.world_size, pipeline_size=point.pipeline_size)
    setting = stage_setting(config, stage.values, stage.parallel, topology, stage.layout)
    workload = replace(problem.workload, max_images_per_row=max(point.images))
    return peak_bytes(config.model, workload, setting, problem.execution)
