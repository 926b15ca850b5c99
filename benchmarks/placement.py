"""Where images are encoded: by each rank of stage zero, by shares among them, or ahead of the pipeline by all ranks.

Multimodal steps in turns on two ranks, at TP2 with sequence parallelism and at PP2, where each placement has the layout
that planning gives it; then the 7B simulated on 512 A100, each placement with its best layout.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.calibrated import calibration_of, simulator, time_here
from benchmarks.paired import quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.rounds import Taken, slowest, speedup
from benchmarks.workbench import compose_run, composed, in_turns
from megatron_vl.config.root import PretrainConfig
from megatron_vl.planning.candidate import Candidate
from megatron_vl.planning.rebalance import Pipeline, best_splits
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.train.division import stage_problem
from megatron_vl.train.settings import stage_values
from tests.support.ranks import run_ranks

HEAD = "model.language.vocab_size=11008"  # takes the time of some 1.9 layers here: by FLOPs 3
STEPS = {"multimodal": (6, 4, 6, 4)}  # the images of each microbatch
SHARES = {"multimodal": 1.0}
ROUNDS = 15
PLACEMENTS = {"TP2": ("replicated", "split", "spread"), "PP2": ("replicated", "spread")}
GRIDS = {
    "TP2": ("parallel.tensor_size=2", "parallel.sequence_parallel=true"),
    "PP2": ("parallel.pipeline_size=2",),
}
GOALS = {("TP2", "split"): 1.03, ("TP2", "spread"): 1.05, ("PP2", "spread"): 0.99}


def configured(grid: str, placement: str, layout: str | None = None) -> PretrainConfig:
    config = composed(
        *GRIDS[grid],
        HEAD,
        f"parallel.vision_placement={placement}",
        f"train.global_batch_size={len(STEPS['multimodal'])}",
        "stage.joint.text_ratio=0",
        "stage.joint.text_warmup_fraction=0",
    )
    return replace(config, parallel=replace(config.parallel, layout=layout))


def calibrate(grid: str) -> object:
    return time_here(configured(grid, "replicated"), 5)


def layouts(grid: str) -> dict[str, str | None]:
    """By placement, from times that the same two ranks took."""
    if grid == "TP2":
        return dict.fromkeys(PLACEMENTS[grid])
    calibration = calibration_of(configured(grid, "replicated"), run_ranks(2, calibrate, grid))
    found: dict[str, str | None] = {}
    for placement in PLACEMENTS[grid]:
        config = configured(grid, placement)
        pipeline = Pipeline(num_layers=config.model.language.num_layers, pipeline_size=2)
        with simulator(config, calibration, 2) as steps:
            found[placement] = best_splits(pipeline, steps.mean_seconds, [])[0].layout
    return found


def measure(grid: str, layouts: dict[str, str | None]) -> Taken:
    configs = {placement: configured(grid, placement, layout) for placement, layout in layouts.items()}
    return in_turns(configs, STEPS, ROUNDS)


def compare(grid: str) -> tuple[list[Sequence[str | float]], list[Goal]]:
    chosen = layouts(grid)
    by_rank = run_ranks(2, measure, grid, chosen, timeout_seconds=280)
    rows: list[Sequence[str | float]] = []
    goals = []
    for placement, layout in chosen.items():
        seconds = {clock: slowest(by_rank, placement, "multimodal", clock) for clock in ("cpu", "wall")}
        gain = {clock: speedup(by_rank, placement, "replicated", SHARES, clock) for clock in ("cpu", "wall")}
        rows.append(
            [
                f"{grid} {placement}",
                layout or "-",
                str(quartiles(seconds["cpu"])),
                str(gain["cpu"]),
                str(gain["wall"]),
            ]
        )
        if placement != "replicated":
            ratio = gain["cpu"].median
            goals.append(
                _at_least(f"{grid}, {placement} (slowest rank's CPU)", ratio, GOALS[grid, placement])
            )
    return rows, goals


def on_cluster() -> tuple[list[Sequence[str | float]], Goal]:
    """The joint stage of the 7B at TP2 x PP2 with virtual stages: its mean and its multimodal steps, by placement."""
    config = compose_run("model=deepseek_vl_7b", "cluster=a100_64x8")
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2, virtual_size=3)
    problem = stage_problem(config, "joint", stage_values(config, "joint"))
    seconds: dict[str, tuple[float, float]] = {}
    rows: list[Sequence[str | float]] = []
    for placement in ("replicated", "split", "spread"):
        setting = Setting(
            topology=topology,
            layout="",
            sequence_parallel=True,
            micro_batch_size=1,
            vision_placement=placement,
        )
        candidate = Candidate(problem, setting)
        counts = candidate.best_split()
        if counts is None:
            raise RuntimeError(f"no split of the 7B fits with {placement} vision")
        multimodal = candidate.steps.of_kind(candidate.steps.kinds[-1], np.array([counts]).T)
        here = seconds[placement] = candidate.seconds(counts), float(multimodal.seconds[0])
        gains = [a / b for a, b in zip(seconds["replicated"], here, strict=True)]
        rows.append([placement, ",".join(map(str, counts)), here[0], gains[0], here[1], gains[1]])
    gain = seconds["replicated"][1] / seconds["spread"][1]
    return rows, _at_least("512 A100, spread (simulated multimodal step)", gain, 1.06)


def _at_least(name: str, ratio: float, goal: float) -> Goal:
    return Goal(name=name, ours=ratio, peer=1.0, unit="x", ratio=ratio, bound="at least", goal=goal)


def main() -> None:
    measured: list[Sequence[str | float]] = []
    goals: list[Goal] = []
    for grid in GRIDS:
        rows, own = compare(grid)
        measured += rows
        goals += own
    print(
        table(["placement", "layout", "CPU s", "CPU, over replicated", "wall, over replicated"], measured),
        end="\n\n",
    )
    rows, goal = on_cluster()
    print(
        table(["simulated, 512 A100", "layers", "mean step s", "gain", "multimodal step s", "gain"], rows),
        end="\n\n",
    )
    print_goals("placement", [*goals, goal])


if __name__ == "__main__":
    run_benchmark(main)
