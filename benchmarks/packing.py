"""How full rows are, how evenly ranks are loaded, and what planning costs: `python -m benchmarks.packing`.

The plan of the paper's joint stage (2304 rows of 4096 tokens, 256 lanes) over lengths as data has them
(`length_mix.py`), with the values of `DataConfig` as they come, on one core.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from benchmarks.length_mix import SOURCES, lengths, source
from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.config.data import DataConfig
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.types import MULTIMODAL, TEXT, Pack, StepPlan

ROW, ROWS, LANES, RANKS = 4096, 2304, 256, 256
NUM_SAMPLES, NUM_STEPS = 1_000_000, 80
# Of a pair in a 7B decoder and of an image in frozen towers, relative to a token: an illustration for this mix. In
# training these come from the model (planning/dealing.py).
COST = RowCost(per_token=24_576, per_image=600 * 24_576, per_pair=2_000_000)
PLAN_MS = 200.0
MODALITIES = (MULTIMODAL, TEXT)
FILL_GOALS = {MULTIMODAL: 0.96, TEXT: 0.998}


def settings(**changes: object) -> PlanSettings:
    """The joint stage's plan."""
    data = DataConfig()
    values: dict[str, object] = {
        "stage": "joint",
        "seed": 0,
        "num_steps": 10**6,
        "text_ratio": 0.5,
        "text_warmup_fraction": 0.0,
        "grouping": "step",
        "sources": dict.fromkeys(SOURCES, 1.0),
        "max_epochs": {},
        "global_batch_size": ROWS,
        "micro_batch_size": 1,
        "sequence_length": ROW,
        "packing": True,
        "lanes": LANES,
        "shuffle_window": data.shuffle_window,
        "packing_window": data.packing_window,
        "max_carry_steps": data.max_carry_steps,
        "flush_steps": data.flush_steps,
        "max_images_per_pack": data.max_images_per_pack,
        "balance_lanes": data.balance_lanes,
        "cost": COST,
    }
    return PlanSettings(**(values | changes))  # type: ignore[arg-type]  # values of many types


def fill(packs: Sequence[Pack]) -> float:
    """The share of positions that hold tokens."""
    return sum(pack.num_tokens for pack in packs) / (len(packs) * ROW)


def in_order(modality: str) -> Iterator[int]:
    """Lengths as they come, long documents cut."""
    tokens, _ = lengths(modality, 100_000, seed=1)
    for length in tokens.tolist():
        yield from (
            [ROW] * (length // ROW) + ([length % ROW] if length % ROW else [])
            if modality == TEXT
            else [length] * (length <= ROW)
        )


def pad_each(modality: str) -> float:
    """Fill with one unit a row."""
    units = list(in_order(modality))
    return sum(units) / (len(units) * ROW)


def next_fit(modality: str) -> float:
    """Fill where a row is closed by the first unit that does not fit."""
    rows, free, total = 0, 0, 0
    for length in in_order(modality):
        if length > free:
            rows, free = rows + 1, ROW
        free, total = free - length, total + length
    return total / (rows * ROW)


def best_fit_stream(modality: str, num_open: int = 64) -> float:
    """Fill where each unit goes into the tightest of `num_open` rows, and the fullest is closed for a new one."""
    rooms: list[int] = []
    rows, total = 0, 0
    for length in in_order(modality):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            if len(rooms) == num_open:
                rooms.remove(min(rooms))
            rooms.append(ROW - length)
            rows += 1
        total += length
    return total / (rows * ROW)


def load_ratio(plans: Sequence[StepPlan]) -> float:
    """The slowest rank's cost over the mean."""
    loads = [sum(COST.of(pack) for pack in plan.packs) for plan in plans]
    return max(loads) / (sum(loads) / len(loads))


@dataclass(frozen=True, kw_only=True)
class Found:
    """By modality: fill, and load ratio of 64 ranks with rows dealt by cost and as planned. Median of plans, in ms."""

    fill: dict[str, float]
    dealt: dict[str, float]
    planned: dict[str, float]
    plan_ms: float


def measure() -> Found:
    tables = {name: source(name, modality, NUM_SAMPLES) for name, modality in SOURCES.items()}
    whole = Planner(tables, settings())
    filled: dict[str, list[float]] = {name: [] for name in MODALITIES}
    seconds = []
    for _ in range(NUM_STEPS):
        began = time.process_time()
        plan = whole.next()
        seconds.append(time.process_time() - began)
        filled[plan.modality].append(fill(plan.packs))
    return Found(
        fill={name: float(np.mean(values)) for name, values in filled.items()},
        dealt=_loads(Planner(tables, settings(), 0, RANKS)),
        planned=_loads(*(Planner(tables, settings(balance_lanes=0), rank, RANKS) for rank in range(64))),
        plan_ms=float(np.median(seconds)) * 1e3,
    )


def _loads(*planners: Planner) -> dict[str, float]:
    """By modality, the mean load ratio of the 64 ranks that these planners plan for."""
    ratios: dict[str, list[float]] = {TEXT: [], MULTIMODAL: []}
    for steps in islice(zip(*(iter(planner.next_of_group, None) for planner in planners), strict=True), 20):
        plans = [plan for step in steps for plan in step.values()]
        ratios[plans[0].modality].append(load_ratio(plans))
    return {name: float(np.mean(values)) for name, values in ratios.items()}


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = measure()
    peers = {"pad each": pad_each, "next fit": next_fit, "best-fit stream, 64 open": best_fit_stream}
    rows: list[list[str | float]] = [[name, of(MULTIMODAL), of(TEXT)] for name, of in peers.items()]
    rows.append(["ours: fullest of a window, carried, flushed", found.fill[MULTIMODAL], found.fill[TEXT]])
    print(table(["fill of rows of 4096", *MODALITIES], rows), end="\n\n")
    rows = [
        ["as planned, lane by lane", *(found.planned[name] for name in MODALITIES)],
        ["dealt by cost", *(found.dealt[name] for name in MODALITIES)],
    ]
    print(table(["slowest of 64 ranks over the mean", *MODALITIES], rows), end="\n\n")
    goals = [
        Goal(
            name=f"{name} fill",
            ours=found.fill[name],
            peer=best_fit_stream(name),
            unit="of a row",
            ratio=found.fill[name],
            bound="at least",
            goal=goal,
        )
        for name, goal in FILL_GOALS.items()
    ]
    goals += [
        Goal(
            name=f"{name} load",
            ours=found.dealt[name],
            peer=found.planned[name],
            unit="of the mean",
            ratio=found.dealt[name],
            bound="at most",
            goal=1.01,
        )
        for name in MODALITIES
    ]
    goals.append(
        Goal(
            name="a plan of 2304 rows",
            ours=found.plan_ms,
            peer=PLAN_MS,
            unit="ms",
            ratio=found.plan_ms / PLAN_MS,
            bound="at most",
            goal=1.0,
        )
    )
    print_goals("packing", goals)


if __name__ == "__main__":
    run_benchmark(main)
