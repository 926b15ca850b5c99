"""What planning found, for people and for programs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_vl.config.plan import PlanConfig
from megatron_vl.planning.candidate import Candidate, Problem
from megatron_vl.planning.forecast import Forecast, split_of
from megatron_vl.planning.trace import simulated_timeline, write_chrome_trace, write_png

GIB = 2**30
WIDTH = 120  # where no terminal says its own


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, and the best settings for it, the fastest first."""

    problem: Problem
    found: list[Forecast]

    @property
    def best(self) -> Forecast:
        return self.found[0]


def show(config: PlanConfig, plans: Sequence[StagePlan]) -> None:
    """Tables, or one JSON object as the last line; pictures where they are asked for."""
    if config.output == "table":
        console = console_for()
        for plan in plans:
            console.print(headline(config, plan), soft_wrap=True)
            console.print(settings_table(plan))
            console.print(overrides_of(plan), soft_wrap=True)
        console.print(
            f"all stages: {_days(sum(plan.best.days for plan in plans))} days, simulated", soft_wrap=True
        )
    for plan in plans if config.timeline is not None else ():
        for path in draw(plan, Path(str(config.timeline))):
            print(path)
    if config.output == "json":
        print(json.dumps(summary(plans)), flush=True)


def console_for() -> Console:
    """Of standard output, wide enough for tables where that is a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def headline(config: PlanConfig, plan: StagePlan) -> str:
    """What the table is about."""
    workload, cluster = plan.problem.workload, plan.problem.cluster
    timed = "measured units" if cluster.calibration else "published figures"
    return (
        f"stage {workload.stage} of {config.model.name} on {cluster.name} ({cluster.num_devices} devices): "
        f"{workload.num_steps:,} steps of {workload.global_batch_size:,} rows, {workload.text_ratio:.0%} text; "
        f"simulated from {timed}"
    )


def settings_table(plan: StagePlan) -> Table:
    """A line for each setting."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("TP", "PP", "VPP", "DP", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("recompute", "vision", "layers"):
        table.add_column(column, overflow="fold")
    for column in ("step s", "bubble", "MFU", "with vision", "GiB", "days"):
        table.add_column(column, justify="right", no_wrap=True)
    for forecast in plan.found:
        setting, topology = forecast.setting, forecast.setting.topology
        table.add_row(
            str(topology.tensor_size),
            str(topology.pipeline_size),
            str(topology.virtual_size),
            str(topology.data_size),
            str(setting.micro_batch_size),
            setting.recompute + (" + vision" if setting.recompute_vision else ""),
            setting.vision_placement,
            layers_of(setting.layout),
            f"{forecast.step_seconds:.3f}",
            f"{forecast.bubble_fraction:.1%}",
            f"{forecast.mfu:.1%}",
            f"{forecast.mfu_with_vision:.1%}",
            f"{forecast.peak_memory_bytes / GIB:.1f}",
            _days(forecast.days),
        )
    return table


def _days(days: float) -> str:
    return f"{days:.2f}" if days >= 0.1 else f"{days:.2g}"


def layers_of(layout: str) -> str:
    """How many decoder layers each chunk has, equal neighbours together: 1,2,3x9,0."""
    counts = [
        (count, len(list(run))) for count, run in groupby(chunk.count("t") for chunk in layout.split("|"))
    ]
    return ",".join(str(count) if times == 1 else f"{count}x{times}" for count, times in counts)


def overrides_of(plan: StagePlan) -> str:
    """The best setting as launch.pretrain takes it."""
    setting, topology, name = plan.best.setting, plan.best.setting.topology, plan.problem.workload.stage
    values = {
        "tensor_size": topology.tensor_size,
        "pipeline_size": topology.pipeline_size,
        "virtual_size": topology.virtual_size,
        "sequence_parallel": str(setting.sequence_parallel).lower(),
        "layout": f'"{setting.layout}"',
        "vision_placement": setting.vision_placement,
    }
    parallel = ",".join(f"{field}:{value}" for field, value in values.items())
    recompute = [f"recompute.language={setting.recompute}"] if setting.recompute != "none" else []
    recompute += ["recompute.vision=true"] if setting.recompute_vision else []
    rest = " ".join([f"stage.{name}.micro_batch_size={setting.micro_batch_size}", *recompute])
    return f"the first one: 'stage.{name}.parallel={{{parallel}}}' {rest}"


def draw(plan: StagePlan, folder: Path) -> list[Path]:
    """A picture and a Chrome trace of each kind of step under the best setting. Returns the files."""
    setting, problem = plan.best.setting, plan.problem
    steps = Candidate(problem, setting).steps
    timelines = [
        simulated_timeline(
            f"{problem.workload.stage}, {kind.name} step", steps.of_kind(kind, split_of(setting.layout))
        )
        for kind in steps.kinds
    ]
    folder.mkdir(parents=True, exist_ok=True)
    picture, trace = (folder / f"{problem.workload.stage}.{suffix}" for suffix in ("png", "json"))
    write_png(picture, timelines)
    write_chrome_trace(trace, timelines)
    return [picture, trace]


def summary(plans: Sequence[StagePlan]) -> dict[str, Any]:
    """The best setting of the stage that takes longest, the days of all stages, and each stage's best."""
    stages = [{"stage": plan.problem.workload.stage} | _values(plan.best) for plan in plans]
    longest = max(stages, key=lambda values: values["days"])
    return longest | {"days": sum(values["days"] for values in stages), "simulated": True, "stages": stages}


def _values(forecast: Forecast) -> dict[str, Any]:
    setting, topology = forecast.setting, forecast.setting.topology
    return {
        "tensor_size": topology.tensor_size,
        "pipeline_size": topology.pipeline_size,
        "virtual_size": topology.virtual_size,
        "data_size": topology.data_size,
        "sequence_parallel": setting.sequence_parallel,
        "micro_batch_size": setting.micro_batch_size,
        "layout": setting.layout,
        "recompute": setting.recompute,
        "recompute_vision": setting.recompute_vision,
        "vision_placement": setting.vision_placement,
        "step_seconds": forecast.step_seconds,
        "step_seconds_by_kind": {name: step.seconds for name, step in forecast.steps.items()},
        "bubble_fraction": forecast.bubble_fraction,
        "mfu": forecast.mfu,
        "mfu_with_vision": forecast.mfu_with_vision,
        "peak_memory_bytes": forecast.peak_memory_bytes,
        "days": forecast.days,
    }
