"""Simulated against measured training steps: CPU seconds of the busiest rank, for several settings and stages.

Each setting runs on ranks of its own, which time the units of the model (as launch.plan calibrate=true does) in turns
with training steps, all at once, so that they share the machine as they do while they train. The prediction knows
those times, the layout and the order of megatron-core's schedule, and nothing of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch.distributed as dist

from benchmarks.calibrated import Measured, busiest, calibration_of, simulate, time_here
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.workbench import build_side, composed
from megatron_vl.parallel.groups import destroy_groups
from tests.support.ranks import run_ranks

ADAPTOR = "stage.joint.train=[adaptor]"
SIGLIP = "stage.joint.train=[siglip,adaptor,embedding,decoder,head]"
TURNS, ROUNDS, STEPS = 2, 2, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting on `world_size` ranks, and the images of its microbatches."""

    name: str
    world_size: int
    overrides: tuple[str, ...]
    images: tuple[int, ...]


TEXT = (0, 0, 0, 0)
CASES = (
    Case(name="one rank, text", world_size=1, overrides=(), images=TEXT),
    Case(name="one rank, 5 images", world_size=1, overrides=(), images=(5, 5)),
    Case(name="PP2, text", world_size=2, overrides=("parallel.pipeline_size=2",), images=TEXT),
    Case(
        name="PP2, 2 to 8 images", world_size=2, overrides=("parallel.pipeline_size=2",), images=(5, 8, 2, 5)
    ),
    Case(
        name="PP2 x VPP2, 5 images",
        world_size=2,
        overrides=("parallel.pipeline_size=2", "parallel.virtual_size=2"),
        images=(5, 5, 5, 5),
    ),
    Case(name="PP4, 5 images", world_size=4, overrides=("parallel.pipeline_size=4",), images=(5, 5, 5, 5)),
    Case(
        name="PP2 6|4, adaptor trains",
        world_size=2,
        overrides=("parallel.pipeline_size=2", 'parallel.layout="Et*6|t*4L"', ADAPTOR),
        images=(5, 5, 5, 5),
    ),
    Case(
        name="PP2, SigLIP trains too",
        world_size=2,
        overrides=("parallel.pipeline_size=2", SIGLIP),
        images=(5, 5, 5, 5),
    ),
    Case(name="TP2, text", world_size=2, overrides=("parallel.tensor_size=2",), images=TEXT),
    Case(
        name="TP2 SP, 5 images",
        world_size=2,
        overrides=("parallel.tensor_size=2", "parallel.sequence_parallel=true"),
        images=(5, 5),
    ),
    Case(
        name="TP2 SP, vision split",
        world_size=2,
        overrides=(
            "parallel.tensor_size=2",
            "parallel.sequence_parallel=true",
            "parallel.vision_placement=split",
        ),
        images=(4, 8),
    ),
)


def measure(case: Case) -> tuple[list[Measured], list[float]]:
    """On one rank: times of units, turn by turn; CPU seconds of steps."""
    config = composed(*case.overrides, f"train.global_batch_size={len(case.images)}")
    units = [time_here(config, ROUNDS)]
    seconds: list[float] = []
    for _ in range(TURNS):
        side = build_side(config)
        rows = side.microbatches(case.images)
        seconds += [side.step(rows).cpu for _ in range(STEPS + 1)][1:]
        dist.barrier()
        destroy_groups()
        units.append(time_here(config, ROUNDS))
    return units, seconds


def compare(case: Case) -> tuple[float, float]:
    """Simulated and measured CPU seconds of the busiest rank."""
    by_rank = run_ranks(case.world_size, measure, case, timeout_seconds=240)
    config = composed(*case.overrides, f"train.global_batch_size={len(case.images)}")
    calibration = calibration_of(config, [one for measured, _ in by_rank for one in measured])
    replayed = simulate(config, calibration, np.array(case.images, dtype=np.float64), case.world_size)
    measured = max(median(seconds) for _, seconds in by_rank)
    return busiest(replayed), measured


def main() -> None:
    rows: list[Sequence[str | float]] = []
    errors = []
    for case in CASES:
        simulated, measured = compare(case)
        errors.append(abs(simulated / measured - 1))
        rows.append([case.name, simulated, measured, f"{simulated / measured - 1:+.1%}"])
        print(f"{case.name}: simulated {simulated:.3f} s, measured {measured:.3f} s", flush=True)
    print(table(["setting", "simulated s", "measured s", "error"], rows), end="\n\n")
    worst, typical = max(errors), median(errors)
    print_goals(
        "prediction",
        [
            Goal(
                name="median error",
                ours=typical,
                peer=1.0,
                unit="share",
                ratio=typical,
                bound="at most",
                goal=0.05,
            ),
            Goal(
                name="largest error",
                ours=worst,
                peer=1.0,
                unit="share",
                ratio=worst,
                bound="at most",
                goal=0.10,
            ),
        ],
    )


if __name__ == "__main__":
    run_benchmark(main)
