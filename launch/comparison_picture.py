"""The losses of several runs over their steps, as one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launch.comparison import MODALITIES, ComparedRun

MAX_COLUMNS = 3
SMOOTHED = 20  # steps of a mean
LOOK: dict[str, Any] = {"linewidth": 1.4, "marker": "o", "markersize": 2.5}


def draw(runs: Sequence[ComparedRun], path: Path) -> bool:
    """A panel for each modality that was trained and each held-out source; False where there is nothing to draw."""
    modalities = [modality for modality in MODALITIES if any(_losses(run, modality)[0] for run in runs)]
    sources = sorted({source for run in runs for source in run.heldout_losses})
    num_panels = len(modalities) + len(sources)
    if not num_panels:
        return False
    begun = [run for run in runs if run.metrics]
    tints = colormaps["turbo"](np.linspace(0.05, 0.95, len(begun)))
    looks = [
        (run, {"label": run.name, "color": tint, **LOOK}) for run, tint in zip(begun, tints, strict=True)
    ]
    columns = min(MAX_COLUMNS, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.25 * len(begun)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, modality in zip(panels, modalities, strict=False):
        for run, look in looks:
            panel.plot(*_losses(run, modality), **look)
        _finish(panel, f"{modality} steps: loss, mean of {SMOOTHED}")
    for panel, source in zip(panels[len(modalities) :], sources, strict=False):
        for run, look in looks:
            measured = [row for row in run.heldout if row["source"] == source and row["loss"] is not None]
            steps = [row["global_step"] for row in measured]
            panel.plot(steps, [row["loss"] for row in measured], **look)
        _finish(panel, f"held-out loss, {source}")
    for panel in panels[num_panels:]:
        panel.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    figure.savefig(path, dpi=110)
    return True


def _losses(run: ComparedRun, modality: str) -> tuple[list[int], list[float]]:
    """Global steps of a modality, and the mean loss of up to SMOOTHED of them that end there."""
    rows = [row for row in run.metrics if row["modality"] == modality and row["loss"] is not None]
    losses = [row["loss"] for row in rows]
    windows = [losses[max(0, at + 1 - SMOOTHED) : at + 1] for at in range(len(losses))]
    return [row["global_step"] for row in rows], [sum(window) / len(window) for window in windows]


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel("global step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
