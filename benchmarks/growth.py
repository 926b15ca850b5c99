"""Step time and memory as layers, images, rows and ranks grow: measured to 8 ranks, simulated to 4096; with a picture.

`python -m benchmarks.growth [PICTURE]`; the picture is docs/growth.png unless named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.growth_on_cluster import Scaled, strong, weak
from benchmarks.growth_on_ranks import CURVES, Compared, Curve, compare
from benchmarks.report import Goal, print_goals, run_benchmark
from benchmarks.seven_b import markdown
from launch.plan_output import GIB

PICTURE = Path(__file__).parents[1] / "docs" / "growth.png"
MIB = 2**20
SECONDS = (0.3, 1, 3, 10, 30, 60)  # ticks
MEASURED, SIMULATED, OTHER = "#c1440e", "#1f5a8a", "#5a8a1f"


def curve_table(curve: Curve, points: Sequence[Compared]) -> str:
    header = (curve.unit, "CPU s, measured", "simulated", "error %", "MiB, counted", "predicted", "error %")
    rows = []
    for one in points:
        real, said = one.measured, one.simulated
        rows.append(
            [
                str(one.at),
                f"{real.seconds:.3f}",
                f"{said.seconds:.3f}",
                f"{100 * (said.seconds / real.seconds - 1):+.1f}",
                f"{real.peak_bytes / MIB:.1f}",
                f"{said.peak_bytes / MIB:.1f}",
                f"{100 * (said.peak_bytes / real.peak_bytes - 1):+.1f}",
            ]
        )
    return markdown(header, rows)


def scaled_table(points: Sequence[Scaled]) -> str:
    header = ("GPUs", "Rows", "TP PP VPP DP, rows", "Step s", "MFU %", "Bubble %", "GiB")
    rows = []
    for one in points:
        plan, topology = one.forecast, one.forecast.setting.topology
        sizes = (topology.tensor_size, topology.pipeline_size, topology.virtual_size, topology.data_size)
        rows.append(
            [
                str(one.num_ranks),
                str(one.num_rows),
                f"{' '.join(map(str, sizes))}, {plan.setting.micro_batch_size}",
                f"{plan.step_seconds:.2f}",
                f"{100 * plan.mfu:.1f}",
                f"{100 * plan.bubble_fraction:.1f}",
                f"{plan.peak_memory_bytes / GIB:.1f}",
            ]
        )
    return markdown(header, rows)


def draw(
    curves: Sequence[tuple[Curve, Sequence[Compared]]], weak: Sequence[Scaled], strong: Sequence[Scaled]
) -> pyplot.Figure:
    figure, axes = pyplot.subplots(3, 4, figsize=(15, 9.5), layout="constrained")
    for column, (curve, points) in enumerate(curves):
        top, below = axes[0, column], axes[1, column]
        top.set_title(f"small model, by {curve.name}")
        _both(top, points, "seconds", 1.0)
        _both(below, points, "peak_bytes", MIB)
        for axis in (top, below):
            axis.set_xlabel(curve.unit)
            if curve.name == "ranks":
                _powers(axis, [one.at for one in points])
    axes[0, 0].set_ylabel("CPU seconds of a step,\nbusiest rank")
    axes[1, 0].set_ylabel("MiB of tensors,\nfullest rank")
    axes[0, 0].legend()
    _cluster(axes[2], weak, strong)
    return figure


def _both(axis: Axes, points: Sequence[Compared], quantity: str, unit: float) -> None:
    at = [one.at for one in points]
    axis.plot(
        at,
        [getattr(one.simulated, quantity) / unit for one in points],
        "-",
        color=SIMULATED,
        label="simulated",
    )
    measured = [getattr(one.measured, quantity) / unit for one in points]
    axis.plot(at, measured, "o", color=MEASURED, label="measured")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _cluster(axes: Sequence[Axes], weak: Sequence[Scaled], strong: Sequence[Scaled]) -> None:
    sides = {
        "4.5 rows a GPU": (weak, "-", SIMULATED),
        "2304 rows": (strong, "--", OTHER),
    }
    for label, (points, style, colour) in sides.items():
        at = [one.num_ranks for one in points]
        values = (
            [one.forecast.step_seconds for one in points],
            [100 * one.forecast.mfu for one in points],
            [100 * one.forecast.bubble_fraction for one in points],
            [one.forecast.peak_memory_bytes / GIB for one in points],
        )
        for axis, column in zip(axes, values, strict=True):
            axis.plot(at, column, style, marker=".", color=colour, label=label)
    names = ("seconds of a step", "MFU, % of peak", "bubble, % of the step", "GiB of the fullest rank")
    for axis, name in zip(axes, names, strict=True):
        axis.set(title="7B on A100, simulated", ylabel=name, xlabel="GPUs")
        _powers(axis, [8, 32, 128, 512, 2048])
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].set_yticks(SECONDS, [str(tick) for tick in SECONDS])
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    axes[0].legend()


def _powers(axis: Axes, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def goals_of(points: Sequence[Compared]) -> list[Goal]:
    seconds = [abs(one.simulated.seconds / one.measured.seconds - 1) for one in points]
    memory = [abs(one.simulated.peak_bytes / one.measured.peak_bytes - 1) for one in points]
    return [
        _at_most("simulated CPU seconds, median error", median(seconds), 0.05),
        _at_most("simulated CPU seconds, largest error", max(seconds), 0.10),
        _at_most("predicted bytes, largest error", max(memory), 0.05),
    ]


def _at_most(name: str, error: float, goal: float) -> Goal:
    return Goal(name=name, ours=error, peer=1.0, unit="share", ratio=error, bound="at most", goal=goal)


def main() -> None:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    curves = []
    for curve in CURVES:
        curves.append((curve, compare(curve)))
        print(curve_table(*curves[-1]), end="\n\n", flush=True)
    growing, fixed = weak(), strong()
    print(f"Weak scaling\n{scaled_table(growing)}\n\nStrong scaling\n{scaled_table(fixed)}\n")
    draw(curves, growing, fixed).savefig(picture, dpi=75)
    print_goals("growth", goals_of([one for _, points in curves for one in points]))


if __name__ == "__main__":
    run_benchmark(main)
