"""Pictures of pipeline steps, simulated or recorded: Chrome's trace format and PNG."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.planning.simulate import Span
from megatron_vl.planning.steps import StepReplay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MICROSECONDS = 1e6
COLOURS = {"forward": "#6fa8dc", "backward": "#93c47d", "vision": "#e69138"}
LABEL_INCHES = 0.11  # narrower passes go without their number
MOST_INCHES = 40.0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step, per pipeline rank. `seconds`: the whole step, which may end behind the last pass."""

    name: str
    ranks: list[list[Span]]
    seconds: float

    @property
    def bubble_fraction(self) -> float:
        """Share of ranks x the time from the first span to the last in which a rank does nothing."""
        spans = [span for rank in self.ranks for span in rank]
        first, last = min(span.start for span in spans), max(span.end for span in spans)
        return 1 - sum(span.end - span.start for span in spans) / ((last - first) * len(self.ranks))

    @property
    def title(self) -> str:
        return f"{self.name}: {self.seconds:.4g} s, bubble {self.bubble_fraction:.1%}"


def simulated_timeline(name: str, step: StepReplay, case: int = 0) -> Timeline:
    """With the seconds that images take as spans of their own, before the pass that they belong to."""
    before, after = step.encoding[:, case]
    ranks = [
        [part for span in spans for part in _apart(span, step.vision[span.microbatch or 0, case], before)]
        for spans in step.pipeline.spans(case)
    ]
    end = before + step.pipeline.seconds[case]
    for spans in ranks:
        if before:
            spans.insert(0, Span(kind="vision", start=0.0, end=float(before)))
        if after:
            spans.append(Span(kind="vision", start=float(end), end=float(end + after)))
    return Timeline(name=name, ranks=ranks, seconds=float(step.seconds[case]))


def _apart(span: Span, vision: float, later: float) -> list[Span]:
    """A pass `later`, its images' share first."""
    span = replace(span, start=span.start + later, end=span.end + later)
    if span.kind != "forward" or span.chunk != 0 or not vision:
        return [span]
    middle = span.start + float(vision)
    return [replace(span, kind="vision", end=middle), replace(span, start=middle)]


def write_chrome_trace(path: Path, timelines: list[Timeline]) -> None:
    """For chrome://tracing or Perfetto: a process for each step, a thread for each pipeline rank."""
    events: list[dict[str, object]] = []
    for process, timeline in enumerate(timelines):
        events.append(_name("process_name", process, 0, timeline.title))
        for rank, spans in enumerate(timeline.ranks):
            events.append(_name("thread_name", process, rank, f"pipeline rank {rank}"))
            events += [_event(span, process, rank) for span in spans]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _event(span: Span, process: int, rank: int) -> dict[str, object]:
    places = {"microbatch": span.microbatch, "chunk": span.chunk}
    return {
        "ph": "X",
        "name": span.kind if span.microbatch is None else f"{span.kind} {span.microbatch}",
        "cat": span.kind,
        "pid": process,
        "tid": rank,
        "ts": span.start * MICROSECONDS,
        "dur": (span.end - span.start) * MICROSECONDS,
        "args": {name: value for name, value in places.items() if value is not None},
    }


def write_png(path: Path, timelines: list[Timeline]) -> None:
    """The steps one below the other, on one scale of time. Later virtual stages are paler; what is white is idle."""
    # Only drawing needs it, and it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    most_passes = max(len(spans) for timeline in timelines for spans in timeline.ranks)
    num_ranks = sum(len(timeline.ranks) for timeline in timelines)
    height = 0.45 * num_ranks + 0.9 * len(timelines)
    figure = Figure(figsize=(min(MOST_INCHES, max(10.0, 0.16 * most_passes)), height), layout="constrained")
    rows = figure.subplots(
        len(timelines), 1, squeeze=False, height_ratios=[len(each.ranks) + 1.5 for each in timelines]
    )
    end = max(span.end for timeline in timelines for spans in timeline.ranks for span in spans)
    for axes, timeline in zip(rows[:, 0], timelines, strict=True):
        _draw(axes, timeline, end, shortest_labelled=LABEL_INCHES * end / figure.get_figwidth())
    kinds = dict.fromkeys(span.kind for each in timelines for spans in each.ranks for span in spans)
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds], loc="outside lower right", ncols=3
    )
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]


def _draw(axes: "Axes", timeline: Timeline, end: float, shortest_labelled: float) -> None:
    num_ranks = len(timeline.ranks)
    num_chunks = 1 + max((span.chunk or 0) for spans in timeline.ranks for span in spans)
    for rank, spans in enumerate(timeline.ranks):
        for span in spans:
            stage = (span.chunk or 0) // num_ranks
            paler = 0.6 * stage / max(1, (num_chunks - 1) // num_ranks)
            width = span.end - span.start
            axes.barh(
                rank,
                width,
                left=span.start,
                height=0.9,
                color=COLOURS[span.kind],
                alpha=1 - paler,
                edgecolor="white",
                linewidth=0.3,
            )
            if span.microbatch is not None and span.kind != "vision" and width > shortest_labelled:
                middle = (span.start + span.end) / 2
                axes.text(middle, rank, str(span.microbatch), ha="center", va="center", fontsize=6)
    axes.set_title(timeline.title, loc="left", fontsize=9)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)], fontsize=7)
    axes.set_xlim(0, end)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_xlabel("seconds", fontsize=7)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
