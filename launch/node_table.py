"""What a check of nodes found, as a table on standard error."""

from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_vl.measure.node_judge import GIB, RankReport, Verdict, best_bandwidth


def show(verdict: Verdict) -> None:
    """A row for each node."""
    nodes: dict[str, list[RankReport]] = {}
    for report in verdict.reports:
        nodes.setdefault(report.node, []).append(report)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("node", "TFLOP/s", "GB/s, neighbour", "GB/s, all", "clock, s", "GiB free"):
        table.add_column(column, justify="left" if column == "node" else "right", no_wrap=True)
    table.add_column("not fit")
    clocks = {name: ranks[0].seconds_since_epoch for name, ranks in nodes.items()}
    typical = median(clocks.values())
    for name, ranks in nodes.items():
        free = next((one.free_bytes for one in ranks if one.free_bytes is not None), None)
        table.add_row(
            name,
            f"{min(one.matmul_flops for one in ranks) / 1e12:.2f}",
            f"{best_bandwidth(ranks) / 1e9:.2f}",
            f"{min(one.world_bandwidth for one in ranks) / 1e9:.2f}",
            f"{clocks[name] - typical:+.2f}" if clocks[name] and typical else "",
            "" if free is None else f"{free / GIB:.0f}",
            "; ".join(verdict.wrong.get(name, [])),
        )
    Console(stderr=True, width=160).print(table)
