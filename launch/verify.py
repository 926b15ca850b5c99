"""Builds ranks of a planned cluster without the cluster, and says what each is and holds."""

from collections.abc import Sequence
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.plan_output import GIB, StagePlan, console_for
from launch.rank import quiet_libraries
from megatron_vl.config.plan import PlanConfig
from megatron_vl.measure.verify import RankReport, verify_rank
from megatron_vl.planning.topology import Topology


def verify(config: PlanConfig, plans: Sequence[StagePlan]) -> int:
    """Run a step of `config.ranks` without data, for every stage's best setting. Returns the exit status.

    Raises:
        UserError: the cluster has no such rank.
        RuntimeError: a rank is not as planned; says how.
    """
    quiet_libraries()
    for plan in plans:
        setting = plan.best.setting
        table = _empty(plan)
        for rank in config.ranks or one_of_each_pipeline_rank(setting.topology):
            begun = perf_counter()
            with Console(stderr=True).status(f"rank {rank} of {setting.topology.world_size}"):
                report = verify_rank(
                    plan.problem.model, plan.problem.workload, setting, config.train.precision, rank
                )
            _add(table, report, perf_counter() - begun)
        console_for().print(table)
    return 0


def one_of_each_pipeline_rank(topology: Topology) -> list[int]:
    """Pipeline ranks are tensor_size x data_size apart."""
    return list(range(0, topology.world_size, topology.tensor_size * topology.data_size))


def _empty(plan: StagePlan) -> Table:
    topology = plan.best.setting.topology
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"stage {plan.problem.workload.stage}: ranks of {topology.world_size}, built and run without data",
        title_justify="left",
    )
    for column in ("rank", "TP", "PP", "DP", "parameters", "GiB counted", "GiB predicted", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("layers, by chunk")
    return table


def _add(table: Table, report: RankReport, seconds: float) -> None:
    table.add_row(
        str(report.rank),
        str(report.tensor_rank),
        str(report.pipeline_rank),
        str(report.data_rank),
        f"{report.num_parameters:,}",
        f"{report.peak_bytes / GIB:.2f}",
        f"{report.predicted.total / GIB:.2f}",
        f"{seconds:.0f}",
        " ".join(f"{chunk[0]}-{chunk[-1]}" if chunk else "none" for chunk in report.layers),
    )
