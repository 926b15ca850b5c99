"""The split of the layers that planning picks, against an even one, megatron-core's own accounting, and all others.

Ten decoder layers, a head of some two layers' time (by FLOPs 3.5 in DeepSeek-VL 1.3B, 1.9 in the 7B), frozen towers
of 0.8 layer an image, images in 30 % of the steps: five a row of 512 tokens at PP2, half of each at PP4, where a step
has three times as many rows, or else the pipeline's start and end would weigh more than its slowest rank. The ranks
time the units first; with these times all splits are simulated, and the ten best of them measured in turns with the
others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from benchmarks.calibrated import Measured, calibration_of, simulator, time_here
from benchmarks.paired import quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.rounds import Taken, mixed, speedup
from benchmarks.workbench import composed, in_turns
from megatron_vl.config.root import PretrainConfig
from megatron_vl.planning.rebalance import Pipeline, ScoredSplit, best_splits
from tests.support.ranks import run_ranks

SHARES = {"text": 0.7, "multimodal": 0.3}
CALIBRATION_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Of a step: so many tokens in each, and the images of a multimodal one; and the rounds to measure."""

    num_tokens: int
    images: tuple[int, ...]
    rounds: int

    @property
    def steps(self) -> dict[str, tuple[int, ...]]:
        return {"text": (0,) * len(self.images), "multimodal": self.images}


ROWS = {  # by pipeline size
    2: Rows(num_tokens=512, images=(5,) * 4, rounds=4),
    4: Rows(num_tokens=256, images=(3, 2) * 6, rounds=2),
}
# account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split count both as one layer.
ACCOUNTED = {2: "Et*5|t*5L", 4: "Et*2|ttt|ttt|ttL"}


def configured(pipeline_size: int, layout: str | None = None) -> PretrainConfig:
    rows = ROWS[pipeline_size]
    config = composed(
        "model.language.vocab_size=12288",
        f"stage.joint.sequence_length={rows.num_tokens}",
        f"parallel.pipeline_size={pipeline_size}",
        f"train.global_batch_size={len(rows.images)}",
        "stage.joint.text_ratio=0.7",
        "stage.joint.text_warmup_fraction=0",
        f"stage.joint.expected.images={mean(rows.images)}",
    )
    return replace(config, parallel=replace(config.parallel, layout=layout))


def calibrate(pipeline_size: int) -> Measured:
    return time_here(configured(pipeline_size), CALIBRATION_ROUNDS)


def ranked_splits(pipeline_size: int) -> list[ScoredSplit]:
    """All splits, by simulated seconds of the mixture."""
    config = configured(pipeline_size)
    calibration = calibration_of(config, run_ranks(pipeline_size, calibrate, pipeline_size))
    pipeline = Pipeline(num_layers=config.model.language.num_layers, pipeline_size=pipeline_size)
    with simulator(config, calibration, pipeline_size) as steps:
        return best_splits(pipeline, steps.mean_seconds, [], exhaustive=pipeline.num_splits)


def measure(pipeline_size: int, layouts: Sequence[str | None]) -> Taken:
    configs = {str(layout): configured(pipeline_size, layout) for layout in layouts}
    return in_turns(configs, ROWS[pipeline_size].steps, ROWS[pipeline_size].rounds)


def compare(pipeline_size: int) -> list[Goal]:
    ranked = ranked_splits(pipeline_size)
    auto = ranked[0].layout
    compared = (auto, None, ACCOUNTED[pipeline_size])  # neighbours, so that they meet the same moments
    layouts = list(dict.fromkeys([*compared, *(split.layout for split in ranked[:10])]))
    by_rank = run_ranks(pipeline_size, measure, pipeline_size, layouts, timeout_seconds=400)
    simulated: Mapping[str, float] = {split.layout: split.seconds for split in ranked}
    cpu = {str(layout): mixed(by_rank, str(layout), SHARES, "cpu") for layout in layouts}
    rows: list[Sequence[str | float]] = [
        [
            name,
            simulated.get(name, "-"),
            str(quartiles(seconds)),
            str(quartiles(mixed(by_rank, name, SHARES, "wall"))),
        ]
        for name, seconds in cpu.items()
    ]
    print(f"PP{pipeline_size}: seconds of a mean step; {len(ranked)} splits simulated")
    print(table(["split (None: even)", "simulated", "slowest rank's CPU", "wall"], rows), end="\n\n")
    best = min(cpu, key=lambda name: float(np.median(cpu[name])))
    clocks = ("wall", "cpu") if pipeline_size == 2 else ("cpu",)
    goals = [
        _goal(
            f"PP{pipeline_size}, {clock}: auto over {what}",
            speedup(by_rank, auto, peer, SHARES, clock).median,
            1.10,
        )
        for clock in clocks
        for what, peer in (("even", "None"), ("accounting", ACCOUNTED[pipeline_size]))
        if pipeline_size == 2
    ]
    goals.append(
        _goal(
            f"PP{pipeline_size}, cpu: auto over the best of all",
            speedup(by_rank, auto, best, SHARES, "cpu").median,
            0.97,
        )
    )
    return goals


def _goal(name: str, ratio: float, goal: float) -> Goal:
    return Goal(name=name, ours=ratio, peer=1.0, unit="x", ratio=ratio, bound="at least", goal=goal)


def main() -> None:
    print_goals("split", [goal for pipeline_size in (2, 4) for goal in compare(pipeline_size)])


if __name__ == "__main__":
    run_benchmark(main)
