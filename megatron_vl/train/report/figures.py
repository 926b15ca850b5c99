"""The report's figures as inline SVG, coloured by the page's CSS variables to follow light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_vl.train.report.tables import Ratio, Row, Span

WIDTH_INCHES = 9.4
MAX_POINTS = 1500  # of a series: beyond, evenly thinned
# Colours that stand for CSS variables until `_svg` puts the variables in.
VARIABLES = {
    name: f"#01010{digit}"
    for digit, name in enumerate(
        ("ink", "muted", "grid", "text", "multimodal", "mixed", "forward", "backward")
    )
}
INK, MUTED, GRID = VARIABLES["ink"], VARIABLES["muted"], VARIABLES["grid"]
TINTS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
MODALITIES = ("multimodal", "mixed", "text")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def loss_figure(metrics: Sequence[Row], spans: Sequence[Span]) -> str:
    """Loss by modality over global steps: every step as a dot, the running median as a line."""

    def draw(axes: Axes) -> None:
        _draw_by_modality(axes, metrics, spans, "loss")
        _loss_axis(axes, [row["loss"] for row in metrics if row["loss"] is not None])

    return _svg("loss", draw, height=3.5)


def source_loss_figure(metrics: Sequence[Row], spans: Sequence[Span]) -> str:
    """Loss by source over global steps: running medians within each stage."""
    sources = sorted({source for row in metrics for source in row["loss_by_source"]})
    losses = [loss for row in metrics for loss in row["loss_by_source"].values() if loss is not None]

    def draw(axes: Axes) -> None:
        for source, tint in zip(sources, TINTS * 3, strict=False):
            label = source
            mine = [row for row in metrics if row["loss_by_source"].get(source) is not None]
            for _, rows in groupby(mine, lambda row: row["stage"]):
                points = [(row["global_step"], row["loss_by_source"][source]) for row in rows]
                steps, values = zip(*points, strict=True)
                axes.plot(*_running_median(steps, values), color=tint, label=label)
                label = f"_{source}"  # once in the legend
        _loss_axis(axes, losses)
        _steps_axis(axes, spans)

    return _svg("sources", draw, height=3.0)


def throughput_figure(metrics: Sequence[Row], spans: Sequence[Span]) -> str:
    """Tokens per second by modality, as dots and running medians."""

    def draw(axes: Axes) -> None:
        _draw_by_modality(axes, metrics, spans, "tokens_per_second")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylabel("tokens per second")

    return _svg("throughput", draw, height=2.7)


def text_ratio_figure(ratios: Sequence[Ratio], spans: Sequence[Span]) -> str:
    """The schedule, and the share of text-only batches that each stage has realised so far."""

    def draw(axes: Axes) -> None:
        for number, ratio in enumerate(ratios):
            once = "_" if number else ""  # matplotlib keeps labels with an underscore out of the legend
            lines: list[tuple[str, list[float], dict[str, Any]]] = [
                ("schedule", ratio.scheduled, {"color": MUTED, "linestyle": ":"}),
                ("schedule, cumulative", ratio.scheduled_cumulative, {"color": MUTED, "lw": 5, "alpha": 0.3}),
                ("realised, cumulative", ratio.realised_cumulative, {"color": VARIABLES["text"]}),
            ]
            for label, values, look in lines:
                axes.plot(*_thin(ratio.global_steps, values), label=once + label, **look)
        axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel("share of text-only batches")
        _steps_axis(axes, spans)

    return _svg("ratio", draw, height=2.7)


def heldout_figure(heldout: Sequence[Row], spans: Sequence[Span]) -> str:
    """Held-out loss by source over global steps."""
    sources = sorted({row["source"] for row in heldout})

    def draw(axes: Axes) -> None:
        for source, tint in zip(sources, TINTS * 3, strict=False):
            rows = [row for row in heldout if row["source"] == source and row["loss"] is not None]
            steps, losses = [row["global_step"] for row in rows], [row["loss"] for row in rows]
            axes.plot(steps, losses, marker="o", markersize=3.5, color=tint, label=source)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("held-out loss")
        _steps_axis(axes, spans)

    return _svg("heldout", draw, height=3.0)


def timeline_figure(timelines: Sequence[Row]) -> str:
    """What each pipeline rank computed when, one panel a recorded step, on one time scale."""
    longest = max(_milliseconds(row) for row in timelines)
    num_ranks = 1 + max(event["pp_rank"] for row in timelines for event in row["events"])

    def panel(row: Row) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _draw_events(axes, row["events"])
            axes.set_yticks(range(num_ranks), [f"pipeline rank {rank}" for rank in range(num_ranks)])
            axes.set_ylim(num_ranks - 0.4, -0.6)
            axes.set_xlim(0, longest * 1.005)
            axes.set_xlabel("milliseconds")
            axes.grid(axis="y", visible=False)
            title = (
                f"{row['stage']}, step {row['step']}, {row['modality']}: {row['bubble_fraction']:.0%} bubble"
            )
            axes.set_title(title, loc="left", fontsize=10, color=INK)

        return draw

    height = 1.3 + 0.3 * num_ranks
    return "".join(_svg(f"timeline{number}", panel(row), height) for number, row in enumerate(timelines))


def _draw_events(axes: Axes, events: Sequence[Row]) -> None:
    began = min(event["start"] for event in events)
    for kind in ("forward", "backward"):
        mine = [event for event in events if event["kind"] == kind]
        axes.barh(
            [event["pp_rank"] for event in mine],
            [1e3 * (event["end"] - event["start"]) for event in mine],
            left=[1e3 * (event["start"] - began) for event in mine],
            height=0.72,
            color=VARIABLES[kind],
            alpha=0.85,
            label=kind,
        )


def _milliseconds(timeline: Row) -> float:
    events = timeline["events"]
    return 1e3 * float(max(event["end"] for event in events) - min(event["start"] for event in events))


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Logarithmic where they span much."""
    if losses and max(losses) > 20 * min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("loss per supervised token")


def _draw_by_modality(axes: Axes, metrics: Sequence[Row], spans: Sequence[Span], field: str) -> None:
    for modality in MODALITIES:
        label = modality
        for span in spans:
            steps, values = _series(metrics, span.stage, modality, field)
            colour, size = VARIABLES[modality], 2.5 if len(steps) > 50 else 5
            axes.plot(*_thin(steps, values), ".", markersize=size, color=colour, alpha=0.35)
            axes.plot(*_running_median(steps, values), color=colour, label=label)
            label = f"_{modality}"  # once in the legend
    _steps_axis(axes, spans)


def _series(metrics: Sequence[Row], stage: str, modality: str, field: str) -> tuple[list[int], list[float]]:
    rows = [row for row in metrics if row["stage"] == stage and row["modality"] == modality]
    rows = [row for row in rows if row[field] is not None]
    return [row["global_step"] for row in rows], [row[field] for row in rows]


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    stride = _stride(len(steps))
    return steps[::stride], values[::stride]


def _running_median(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], list[float]]:
    """Over a twentieth of the values, centred (at the ends over what is there), and thinned."""
    half, stride = len(values) // 40, _stride(len(values))
    windows = (values[max(0, at - half) : at + half + 1] for at in range(0, len(values), stride))
    return steps[::stride], [float(np.median(window)) for window in windows]


def _stride(length: int) -> int:
    return -(-length // MAX_POINTS) or 1


def _steps_axis(axes: Axes, spans: Sequence[Span]) -> None:
    """Global steps below, stages named above and divided by lines."""
    axes.set_xlabel("global step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="x", visible=False)
    if spans:
        axes.set_xlim(spans[0].first - 0.5, spans[-1].last + 0.5)
    for span in spans:
        if span is not spans[0]:
            axes.axvline(span.first - 0.5, color=MUTED, linewidth=0.8, dashes=(3, 3))
        middle = (span.first + span.last) / 2
        axes.annotate(
            span.stage, (middle, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", color=MUTED, annotation_clip=False,
        )  # fmt: skip


def _legend(axes: Axes) -> str:
    """Keys of the labelled lines and bars; as HTML, since the page knows better where there is room."""
    keys = []
    handle: Any
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if isinstance(handle, Line2D):
            colour, width, opacity = handle.get_color(), 1.5 * handle.get_linewidth(), handle.get_alpha() or 1
            style = "dotted" if handle.get_linestyle() == ":" else "solid"
        else:  # bars
            colour, width, opacity, style = handle.patches[0].get_facecolor(), 9, 1, "solid"
        look = f"border-top: {width:.1f}px {style} {to_hex(colour)}; opacity: {opacity}"
        keys.append(f'<span class="key"><i style="{look}"></i>{escape(label)}</span>')
    return f"<figcaption>{''.join(keys)}</figcaption>" if keys else ""


def _svg(name: str, draw: Callable[[Axes], None], height: float) -> str:
    """The drawing as an HTML figure; `height` in inches, the width is the page's."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'((?:id|href)="#?|url\(#)', rf"\g<1>{name}-", text)  # several figures share the page
    text = f"<figure>{_legend(axes)}{text}</figure>"
    for variable, colour in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text
