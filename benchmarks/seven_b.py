"""DeepSeek-VL 7B on 64 nodes of eight A100, beside the paper's five days: the tables of docs/deepseek_vl_7b_on_a100.md.

Simulated: nothing here ran on a GPU. What is assumed is in hydra_conf/cluster/a100_64x8.yaml and the model's recipe.
`python -m benchmarks.seven_b [PAGE]` puts the tables into that page too, in place of the old ones.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Goal, print_goals, run_benchmark
from benchmarks.seven_b_variations import CONFIGURATIONS, SENSITIVITY, Variation, plan_all
from launch.plan_output import GIB, layers_of
from megatron_vl.config.errors import UserError
from megatron_vl.planning.candidate import Problem
from megatron_vl.planning.forecast import DAY_SECONDS, Forecast, mean_flops

PAPER_DAYS = 5  # arXiv 2403.05525, section 3.3
STAGES = tuple(Variation(name=name, stage=name) for name in ("adaptor", "joint", "sft"))
KINDS = ("text", "multimodal")
STAGE_HEADER = (
    "Stage",
    "TP PP VPP DP, rows",
    "Vision",
    "Layers",
    "Step s",
    "MFU %",
    "with vision",
    "Bubble % text, multimodal",
    "GiB",
    "Days",
)
CONFIGURATION_HEADER = (
    "Configuration",
    "DP",
    "Vision",
    "Layers",
    "Step s",
    "MFU %",
    "with vision",
    "Bubble % text, multimodal",
    "GiB",
    "Days",
)
SENSITIVITY_HEADER = ("Assumption", "MFU %", "with vision", "Days", "Best setting", "Vision", "Layers")
PAPER_HEADER = ("Joint stage", "Days", "MFU %")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)).replace(
        "| --- ", "|---"
    )


def paper_mfu(problem: Problem) -> float:
    """If all of the paper's days were the joint stage."""
    language, _ = mean_flops(problem.model, problem.workload)
    available = PAPER_DAYS * DAY_SECONDS * problem.cluster.num_devices * problem.cluster.peak_flops
    return language * problem.workload.num_steps / available


def stage_row(stage: str, found: Forecast) -> list[str]:
    return [stage, _sizes(found), found.setting.vision_placement, *_figures(found)]


def configuration_row(configuration: Variation, found: Forecast | None) -> list[str]:
    if found is None:
        return [configuration.name, *["–"] * (len(CONFIGURATION_HEADER) - 1)]
    setting = found.setting
    uniform = " uniform" if configuration.kept.layout else ""
    figures = _figures(found)
    return [
        configuration.name + uniform,
        str(setting.topology.data_size),
        setting.vision_placement,
        *figures,
    ]


def sensitivity_row(name: str, found: Forecast) -> list[str]:
    setting = found.setting
    return [
        name,
        f"{100 * found.mfu:.1f}",
        f"{100 * found.mfu_with_vision:.1f}",
        f"{found.days:.2f}",
        _sizes(found),
        setting.vision_placement,
        layers_of(setting.layout),
    ]


def _sizes(found: Forecast) -> str:
    topology = found.setting.topology
    sizes = (topology.tensor_size, topology.pipeline_size, topology.virtual_size, topology.data_size)
    return f"{' '.join(map(str, sizes))}, {found.setting.micro_batch_size}"


def _figures(found: Forecast) -> list[str]:
    """Layers to days."""
    bubbles = [found.steps[kind].bubble_fraction for kind in KINDS if kind in found.steps]
    return [
        layers_of(found.setting.layout),
        f"{found.step_seconds:.2f}",
        f"{100 * found.mfu:.1f}",
        f"{100 * found.mfu_with_vision:.1f}",
        ", ".join(f"{100 * bubble:.1f}" for bubble in bubbles),
        f"{found.peak_memory_bytes / GIB:.1f}",
        f"{found.days:.2f}",
    ]


def tables(plans: Sequence[Forecast | None], paper: float) -> list[str]:
    """Of the plans of STAGES, CONFIGURATIONS and SENSITIVITY. `paper` is the MFU of its days.

    Raises:
        UserError: a stage or an assumption for which no setting is permitted.
    """
    middle, last = len(STAGES), len(STAGES) + len(CONFIGURATIONS)
    stages = _pairs(STAGES, plans[:middle])
    joint = stages[1][1]
    total = f"{sum(plan.days for _, plan in stages):.2f}"
    configurations = zip(CONFIGURATIONS, plans[middle:last], strict=True)
    return [
        markdown(STAGE_HEADER, [*(stage_row(*pair) for pair in stages), ["all three", *[""] * 8, total]]),
        markdown(
            PAPER_HEADER,
            [
                ["the paper", f"{PAPER_DAYS}", f"{100 * paper:.1f}"],
                ["simulated", f"{joint.days:.2f}", f"{100 * joint.mfu:.1f}"],
            ],
        ),
        markdown(CONFIGURATION_HEADER, [configuration_row(*pair) for pair in configurations]),
        markdown(SENSITIVITY_HEADER, [sensitivity_row(*pair) for pair in _pairs(SENSITIVITY, plans[last:])]),
    ]


def _pairs(variations: Sequence[Variation], plans: Sequence[Forecast | None]) -> list[tuple[str, Forecast]]:
    found = [(one.name, plan) for one, plan in zip(variations, plans, strict=True) if plan is not None]
    if len(found) < len(variations):
        missing = {one.name for one in variations} - {name for name, _ in found}
        raise UserError(f"no setting of the 7B is permitted for: {', '.join(sorted(missing))}")
    return found


def put_into(page: Path, tables: Sequence[str]) -> None:
    """In place of the page's tables with the same headers. Raises UserError where it has no such table."""
    text = page.read_text()
    for table in tables:
        header = table.partition("\n")[0]
        before, found, after = text.partition(header)
        if not found:
            raise UserError(f"{page} has no table that begins with {header!r}")
        text = before + table + "\n\n" + after.partition("\n\n")[2]
    page.write_text(text)


def main() -> None:
    plans = plan_all([*STAGES, *CONFIGURATIONS, *SENSITIVITY])
    paper = paper_mfu(STAGES[1].problem())
    found = tables(plans, paper)
    print("\n\n".join(found), end="\n\n")
    if len(sys.argv) > 1:
        put_into(Path(sys.argv[1]), found)
    mfu = dict(_pairs(STAGES, plans[: len(STAGES)]))["joint"].mfu
    goal = Goal(
        name="MFU of the joint stage, simulated",
        ours=mfu,
        peer=paper,
        unit="of peak",
        ratio=mfu,
        bound="at least",
        goal=0.55,
    )
    print_goals("seven_b", [goal])


if __name__ == "__main__":
    run_benchmark(main)
