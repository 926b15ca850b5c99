"""Whole loaders on the same photographs and captions: CPU time of ours against each peer's, and our loader threads.

A sample is read, its image decoded and resized for both vision towers (384 and 1024), its text tokenised, and all of it
put into batches. Peers get the fastest decoder that there is, libjpeg-turbo, torch's resizing of bytes, and nothing is
normalised on the CPU: those three are not what peers come with. "Our recipe" is that and one square for both towers,
as we do it; no goal, it shows what the loaders themselves cost.

One core and no workers for each side, its median of interleaved repeats. Ends within 8 minutes on 2 idle cores, plus 4
for the environments on first use, which take 5 GB.
"""

import os
import sys
from pathlib import Path
from statistics import median

from benchmarks.peer_environments import PEERS, measured, peer_python
from benchmarks.photographs import samples_folder
from benchmarks.report import Goal, print_goals, run_benchmark, table

NAMES = ("webdataset", "energon", "streaming", "litdata")
RECIPES = {"best": "both towers", "one-square": "our recipe"}
REPEATS, BATCHES, STEPS = 5, 40, 12
THREADS = (0, 1, 2, 4)
OURS = ["-m", "benchmarks.our_loader"]


def our_cost(folder: Path, num_threads: int, *, all_cores: bool = False) -> dict[str, float]:
    arguments = [str(folder), str(num_threads), str(STEPS)]
    return measured(sys.executable, OURS, *arguments, all_cores=all_cores)


def figures(folder: Path, pythons: dict[str, Path]) -> dict[tuple[str, str], float]:
    """Medians in CPU milliseconds a sample, of each side and recipe; ours comes first."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        times.setdefault(("ours", "our recipe"), []).append(our_cost(folder, 0)["cpu_ms"])
        for name, python in pythons.items():
            script = [str(PEERS / f"time_{name}.py")]
            costs = measured(python, script, str(folder), str(BATCHES), *RECIPES, "--batches")
            for pixels, recipe in RECIPES.items():
                times.setdefault((name, recipe), []).append(costs[pixels])
    return {side: median(values) for side, values in times.items()}


def thread_rows(folder: Path) -> list[list[str | float]]:
    """What a sample costs on all cores, for each number of loader threads."""
    rows: list[list[str | float]] = []
    for num_threads in THREADS:
        costs = [our_cost(folder, num_threads, all_cores=True) for _ in range(REPEATS)]
        cpu_ms, wall_ms = (median(cost[kind] for cost in costs) for kind in ("cpu_ms", "wall_ms"))
        rows.append([str(num_threads), cpu_ms, wall_ms, 1000 / wall_ms])
    return rows


def goals(medians: dict[tuple[str, str], float]) -> list[Goal]:
    ours = medians["ours", "our recipe"]
    peers = {name: cost for (name, recipe), cost in medians.items() if recipe == "both towers"}
    fastest = min(peers, key=lambda name: peers[name])
    ratio = ours / peers[fastest]
    title = f"times the fastest peer, {fastest}"
    return [
        Goal(name=title, ours=ours, peer=peers[fastest], unit="ms", ratio=ratio, bound="at most", goal=1.0)
    ]


def main() -> None:
    folder = samples_folder()
    medians = figures(folder, {name: peer_python(name) for name in NAMES})
    rows: list[list[str | float]] = [
        [side, recipe, cost, 1000 / cost] for (side, recipe), cost in medians.items()
    ]
    print(table(["loader", "images", "CPU ms a sample", "samples/s a core"], rows), end="\n\n")
    header = ["our loader threads", "CPU ms", "ms", f"samples/s on {len(os.sched_getaffinity(0))} cores"]
    print(table(header, thread_rows(folder)), end="\n\n")
    print_goals("loaders", goals(medians))


if __name__ == "__main__":
    run_benchmark(main)
