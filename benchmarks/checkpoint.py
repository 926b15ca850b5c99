"""How long training waits for a checkpoint: in the background or not, its optimizer gathered or as ranks hold it.

Two data-parallel ranks save a model of some hundred megabytes with its optimizer, in all four ways in turns, and take a
few steps after each. What training waits in the store is one cost; that the steps meanwhile take longer, as the thread
that writes needs a core too, is the other.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from benchmarks.paired import paired_ratio, quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.workbench import IMAGE_TOKEN, Side, build_side, composed
from megatron_vl.checkpoint.description import Description
from megatron_vl.checkpoint.state import RunState
from megatron_vl.checkpoint.store import CheckpointStore, Saved
from megatron_vl.config.train import CheckpointConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.parallel.gradients import parameters_at_rest
from tests.support.ranks import run_ranks

ROUNDS = 7
STEPS = 3  # at least, after each checkpoint
SIZES = (
    "model.language.hidden_size=512",
    "model.language.ffn_hidden_size=1376",
    "model.language.num_heads=8",
    "stage.joint.sequence_length=128",  # a step in less time than a checkpoint
)
SIDES = [
    (asynchronous, sharding)
    for sharding in ("fully_reshardable", "dp_reshardable")
    for asynchronous in (False, True)
]


@dataclass(frozen=True)
class Cost:
    """Of one checkpoint. `slower_seconds`: what saving and the steps after it took beyond such steps alone."""

    saved: Saved
    slower_seconds: float


def name_of(asynchronous: bool, sharding: str) -> str:
    return f"{sharding}, {'in the background' if asynchronous else 'blocking'}"


def measure(folder: Path) -> dict[str, list[Cost]]:
    """On one rank: by side, what each round's checkpoint cost. A first round warms up."""
    side = build_side(composed(*SIZES, "train.global_batch_size=2"))
    rows = side.microbatches((0,))
    told: list[Saved] = []
    stores = {way: _store(folder / str(number), side, told, *way) for number, way in enumerate(SIDES)}
    costs: dict[str, list[Cost]] = {name_of(*way): [] for way in SIDES}
    side.step(rows)
    for number in range(ROUNDS + 1):
        alone = _step_seconds(side, rows)
        for way in SIDES if number % 2 == 0 else reversed(SIDES):
            dist.barrier()
            began = time.perf_counter()
            _save(stores[way], side, number)
            num_steps = _steps_until_whole(side, rows, stores[way], told)
            seconds = time.perf_counter() - began - num_steps * alone
            if number > 0:
                costs[name_of(*way)].append(Cost(told[-1], seconds))
            told.clear()
    return costs


def _store(folder: Path, side: Side, told: list[Saved], asynchronous: bool, sharding: str) -> CheckpointStore:
    values = CheckpointConfig(asynchronous=asynchronous, optimizer_sharding=sharding, keep=1)
    description = Description(model=side.config.model, image_token_id=IMAGE_TOKEN, tokens=None)
    return CheckpointStore(folder, values, description, folder / "none", told.append)


def _save(store: CheckpointStore, side: Side, step: int) -> None:
    state = RunState(stage="joint", step=step, num_steps=99, global_step=step, plan={}, fingerprint={})
    with parameters_at_rest(side.model.chunks):
        store.save(state, side.model.chunks, side.model.optimizer.inner, side.model.groups)


def _steps_until_whole(side: Side, rows: list[Microbatch], store: CheckpointStore, told: list[Saved]) -> int:
    """Take STEPS steps, and more until the checkpoint is whole on disk. Returns how many."""
    num_steps = 0
    while num_steps < STEPS or not told:
        side.step(rows)
        store.advance(busy=store.is_some_rank_busy())
        num_steps += 1
    return num_steps


def _step_seconds(side: Side, rows: list[Microbatch]) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        side.step(rows)
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        costs = run_ranks(2, measure, Path(folder), timeout_seconds=900)[0]
    stalls = {name: [cost.saved.stall_seconds for cost in ones] for name, ones in costs.items()}
    slower = {name: [cost.slower_seconds for cost in ones] for name, ones in costs.items()}
    lines: list[Sequence[str | float]] = [
        [
            name,
            str(quartiles(stalls[name])),
            str(quartiles(slower[name])),
            str(quartiles([cost.saved.write_seconds for cost in ones])),
            f"{ones[0].saved.num_bytes / 1e6:.0f}",
            f"{ones[0].saved.host_bytes / 1e6:.0f}",
        ]
        for name, ones in costs.items()
    ]
    header = [
        "saved as",
        "training waits s",
        "it and steps until whole, over such steps s",
        "written in s",
        "MB",
        "held MB",
    ]
    print(table(header, lines), end="\n\n")
    fully, buckets = "fully_reshardable", "dp_reshardable"
    background = "in the background over blocking"
    pairs = [
        (f"waits: {background}, by parameter", stalls, (True, fully), (False, fully), 0.7),
        (f"waits: {background}, as ranks hold it", stalls, (True, buckets), (False, buckets), 0.5),
        ("waits: as ranks hold it over by parameter", stalls, (True, buckets), (True, fully), 0.7),
        (f"in all: {background}, as ranks hold it", slower, (True, buckets), (False, buckets), 1.0),
    ]
    goals = []
    for name, seconds, ours, peer, bound in pairs:
        mine, theirs = seconds[name_of(*ours)], seconds[name_of(*peer)]
        goals.append(
            Goal(
                name=name,
                ours=quartiles(mine).median,
                peer=quartiles(theirs).median,
                unit="s",
                ratio=paired_ratio(mine, theirs).median,
                bound="at most",
                goal=bound,
            )
        )
    print_goals("checkpoint", goals)


if __name__ == "__main__":
    run_benchmark(main)
