"""The numbers of the report, computed from the rows that a run has written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from megatron_vl.train.startup import PHASES

Row = dict[str, Any]

MAX_MOMENTS = 8  # evaluations that a table of benchmarks shows
LAST_STEPS = 20  # over which a final loss is the median


@dataclass(frozen=True, kw_only=True)
class Span:
    """The global steps of one stage, first and last included."""

    stage: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the run's steps add up to."""

    num_steps: int
    num_tokens: int
    num_images: int
    num_failed_samples: int
    num_skipped: int
    seconds: float
    final_losses: dict[str, float]  # by modality: median over the last steps of the last stage that has it


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Text-only global batches of a stage: cumulative share after each step, scheduled and realised."""

    stage: str
    global_steps: list[int]
    scheduled: list[float]  # at each step
    scheduled_cumulative: list[float]
    realised_cumulative: list[float]
    largest_gap: float  # in global batches


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Throughput of one stage and modality; medians over steps."""

    stage: str
    modality: str
    num_steps: int
    step_seconds: float
    tokens_per_second: float
    images_per_second: float
    mfu: float | None  # None where no peak was known
    mfu_with_vision: float | None
    data_wait_share: float
    read_amplification: float | None  # bytes fetched per byte used, over all steps; None where none was used


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """Idle share of the pipeline in the recorded steps of one stage and modality: mean, least and largest."""

    stage: str
    modality: str
    num_steps: int
    mean: float
    least: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What the checkpoints of one stage cost: medians, and the longest that training waited for one."""

    stage: str
    num_checkpoints: int
    optimizer_sharding: str
    num_bytes: float
    host_bytes: float
    stall_seconds: float
    longest_stall_seconds: float
    write_seconds: float


@dataclass(frozen=True, kw_only=True)
class StartupTable:
    """How long the latest start of each stage took: (seconds, on the slowest rank) of each phase, None where it had
    no such phase, and of all together."""

    stages: list[str]
    phases: dict[str, list[tuple[float, float] | None]]
    totals: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class HeldoutRow:
    """A held-out source: (loss at the start, at the end) of each stage, None where it was not measured."""

    source: str
    num_samples: int
    losses: list[tuple[float | None, float | None]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One overall metric of a benchmark: its value at each of the table's moments, None where there is none."""

    benchmark: str
    metric: str
    method: str
    num_items: int
    values: list[float | None]


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """`moments`: stage and step of the latest evaluations, in order."""

    moments: list[str]
    rows: list[BenchmarkRow]


def stage_spans(metrics: Sequence[Row]) -> list[Span]:
    return [
        Span(stage=stage, first=rows[0]["global_step"], last=rows[-1]["global_step"])
        for stage, rows in _groups(metrics, "stage").items()
    ]


def totals(metrics: Sequence[Row]) -> Totals:
    final: dict[str, float] = {}
    for (_, modality), rows in _groups(metrics, "stage", "modality").items():
        losses = [row["loss"] for row in rows[-LAST_STEPS:] if row["loss"] is not None]
        if losses:
            final[modality] = median(losses)
    return Totals(
        num_steps=len(metrics),
        num_tokens=sum(row["num_tokens"] for row in metrics),
        num_images=sum(row["num_images"] for row in metrics),
        num_failed_samples=sum(row["num_failed_samples"] for row in metrics),
        num_skipped=sum(row["skipped"] for row in metrics),
        seconds=sum(row["step_seconds"] for row in metrics),
        final_losses=final,
    )


def text_ratios(metrics: Sequence[Row]) -> list[Ratio]:
    """Scheduled and realised shares stage by stage."""
    ratios = []
    for stage, rows in _groups(metrics, "stage").items():
        expected, text, gap = 0.0, 0.0, 0.0
        scheduled_cumulative, realised_cumulative = [], []
        for count, row in enumerate(rows, start=1):
            expected += row["text_ratio"]
            text += row["text_share"]
            gap = max(gap, abs(text - expected))
            scheduled_cumulative.append(expected / count)
            realised_cumulative.append(text / count)
        ratios.append(
            Ratio(
                stage=stage,
                global_steps=[row["global_step"] for row in rows],
                scheduled=[row["text_ratio"] for row in rows],
                scheduled_cumulative=scheduled_cumulative,
                realised_cumulative=realised_cumulative,
                largest_gap=gap,
            )
        )
    return ratios


def speeds(metrics: Sequence[Row]) -> list[Speed]:
    return [
        Speed(
            stage=stage,
            modality=modality,
            num_steps=len(rows),
            step_seconds=median(row["step_seconds"] for row in rows),
            tokens_per_second=median(row["tokens_per_second"] for row in rows),
            images_per_second=median(row["num_images"] / row["step_seconds"] for row in rows),
            mfu=_median(row["mfu"] for row in rows),
            mfu_with_vision=_median(row["mfu_with_vision"] for row in rows),
            data_wait_share=median(row["data_wait_seconds"] / row["step_seconds"] for row in rows),
            read_amplification=_read_amplification(rows),
        )
        for (stage, modality), rows in _groups(metrics, "stage", "modality").items()
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _read_amplification(rows: Sequence[Row]) -> float | None:
    used = sum(row["bytes_used"] for row in rows)
    return sum(row["bytes_fetched"] for row in rows) / used if used else None


def bubbles(timelines: Sequence[Row]) -> list[Bubble]:
    found = []
    for (stage, modality), rows in _groups(timelines, "stage", "modality").items():
        fractions = [row["bubble_fraction"] for row in rows]
        found.append(
            Bubble(
                stage=stage,
                modality=modality,
                num_steps=len(rows),
                mean=fmean(fractions),
                least=min(fractions),
                largest=max(fractions),
            )
        )
    return found


def savings(checkpoints: Sequence[Row]) -> list[Saving]:
    return [
        Saving(
            stage=stage,
            num_checkpoints=len(rows),
            optimizer_sharding=sharding,
            num_bytes=median(row["num_bytes"] for row in rows),
            host_bytes=median(row["host_bytes"] for row in rows),
            stall_seconds=median(row["stall_seconds"] for row in rows),
            longest_stall_seconds=max(row["stall_seconds"] for row in rows),
            write_seconds=median(row["write_seconds"] for row in rows),
        )
        for (stage, sharding), rows in _groups(checkpoints, "stage", "optimizer_sharding").items()
    ]


def startup_table(starts: Sequence[Row]) -> StartupTable | None:
    """None where no stage has done its first step."""
    latest = {row["stage"]: row for row in starts}
    phases = [phase for phase in PHASES if any(phase in row["seconds"] for row in latest.values())]
    if not latest:
        return None
    return StartupTable(
        stages=list(latest),
        phases={
            phase: [
                (row["seconds"][phase], row["slowest"][phase]) if phase in row["seconds"] else None
                for row in latest.values()
            ]
            for phase in phases
        },
        totals=[(sum(row["seconds"].values()), sum(row["slowest"].values())) for row in latest.values()],
    )


def heldout_table(heldout: Sequence[Row], stages: Sequence[str]) -> list[HeldoutRow]:
    """A row for each source; a stage's start is what was measured at step 0, its end what was last."""
    table = []
    for source, rows in _groups(heldout, "source").items():
        losses = []
        for stage in stages:
            mine = [row for row in rows if row["stage"] == stage]
            start = next((row["loss"] for row in mine if row["step"] == 0), None)
            end = next((row["loss"] for row in reversed(mine) if row["step"] > 0), None)
            losses.append((start, end))
        table.append(HeldoutRow(source=source, num_samples=rows[-1]["num_samples"], losses=losses))
    return table


def benchmark_table(scores: Sequence[Row]) -> BenchmarkTable | None:
    """The last MAX_MOMENTS evaluations, without categories; None where no benchmark ran."""
    overall = [row for row in scores if "/" not in row["metric"]]
    moments = list(_groups(overall, "stage", "step"))[-MAX_MOMENTS:]
    rows = []
    for (benchmark, metric), group in _groups(overall, "benchmark", "metric").items():
        by_moment = {(row["stage"], row["step"]): row["value"] for row in group}
        rows.append(
            BenchmarkRow(
                benchmark=benchmark,
                metric=metric,
                method=group[-1]["method"],
                num_items=group[-1]["num_items"],
                values=[by_moment.get(moment) for moment in moments],
            )
        )
    labels = [f"{stage} {step}" for stage, step in moments]
    return BenchmarkTable(moments=labels, rows=rows) if rows else None


def _groups(rows: Iterable[Row], *fields: str) -> dict[Any, list[Row]]:
    """Rows by the value of one field, or the tuple of several, in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = row[fields[0]] if len(fields) == 1 else tuple(row[field] for field in fields)
        groups.setdefault(key, []).append(row)
    return groups
