"""Which nodes are not fit to train on, by what all ranks found on theirs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import NodeCheckConfig

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found. Rates are per second; `problem` is an error that ended its measurements."""

    node: str  # nothing, where the rank has not even told that
    device: str = ""  # cpu or cuda
    matmul_flops: float = 0.0
    free_bytes: int | None = None  # of the folder, as the first rank of a node sees it
    seconds_since_epoch: float = 0.0  # just after all ranks met
    bandwidths: tuple[float, ...] = ()  # bytes, in each round of all-reduces that it took part in
    world_bandwidth: float = 0.0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`wrong`: what is wrong with each node that is not fit."""

    reports: list[RankReport]
    wrong: dict[str, list[str]]


def judge_alone(reports: Sequence[RankReport], folder: Path, limits: NodeCheckConfig) -> dict[str, list[str]]:
    """What is wrong with each node that is not fit, of `reports` of all ranks in their order.

    Raises:
        UserError: the folder cannot be used, or has too little space, on all nodes: it is not theirs to mend.
    """
    wrong = _problems(reports)
    on_gpus = any(report.device == "cuda" for report in reports)
    for node in sorted(
        {report.node for report in reports if on_gpus and report.device == "cpu"} - set(wrong)
    ):
        wrong[node] = ["no GPU, as other nodes have"]
    free = {one.node: one.free_bytes for one in reports if one.free_bytes is not None}
    full = {node: found for node, found in free.items() if found < limits.min_free_gib * GIB}
    if free and len(full) == len(free):
        raise UserError(
            f"run.dir={folder} has {max(full.values()) / GIB:.1f} GiB free, below node_check.min_free_gib="
            f"{limits.min_free_gib:g}; {next((one.problem for one in reports if one.problem), 'choose another')}"
        )
    for node, found in full.items():
        wrong.setdefault(node, []).append(
            f"{found / GIB:.1f} GiB free in the run's folder, below {limits.min_free_gib:g}"
        )
    slowest = _by_node(reports, lambda ranks: min(one.matmul_flops for one in ranks))
    _add_slow(
        wrong,
        slowest,
        limits.min_matmul_share,
        lambda flops: f"matrix products at {flops / 1e12:.2f} TFLOP/s",
    )
    return wrong


def judge_together(reports: Sequence[RankReport], limits: NodeCheckConfig) -> dict[str, list[str]]:
    """What is wrong with each node that is not fit, of `reports` of all ranks in their order. Where all of three nodes
    or more have a problem, it is none that a node has by itself, and stands under no name."""
    wrong = _problems(reports)
    if len(wrong) > 2 and len(wrong) == len({report.node for report in reports}):
        return {"": sorted({problem for problems in wrong.values() for problem in problems})}
    rates = _by_node(reports, best_bandwidth)
    _add_slow(wrong, rates, limits.min_bandwidth_share, lambda rate: f"all-reduce at {rate / 1e9:.2f} GB/s")
    clocks = _by_node(reports, lambda ranks: ranks[0].seconds_since_epoch)
    typical = median(clocks.values()) if clocks else 0.0
    for node, clock in clocks.items():
        if limits.max_clock_skew_seconds and abs(clock - typical) > limits.max_clock_skew_seconds:
            wrong.setdefault(node, []).append(f"its clock is {clock - typical:+.1f} s off")
    return wrong


def _problems(reports: Sequence[RankReport]) -> dict[str, list[str]]:
    problems: dict[str, list[str]] = {}
    for report in reports:
        if report.problem:
            problems.setdefault(report.node, []).append(report.problem)
    return problems


def best_bandwidth(ranks: Sequence[RankReport]) -> float:
    """Of a node's ranks: the slowest one, in the node's best round of those that all of them have done."""
    return max(
        (min(of_round) for of_round in zip(*(one.bandwidths for one in ranks), strict=False)), default=0.0
    )


def _by_node(reports: Sequence[RankReport], value: Callable[[list[RankReport]], float]) -> dict[str, float]:
    """Of nodes whose ranks have no problem."""
    ranks: dict[str, list[RankReport]] = {}
    for report in reports:
        ranks.setdefault(report.node, []).append(report)
    return {
        node: value(of_node) for node, of_node in ranks.items() if not any(one.problem for one in of_node)
    }


def _add_slow(
    wrong: dict[str, list[str]], rates: dict[str, float], min_share: float, told: Callable[[float], str]
) -> None:
    typical = median(rates.values()) if rates else 0.0
    for node, rate in rates.items():
        if rate < min_share * typical:
            wrong.setdefault(node, []).append(f"{told(rate)}, {rate / typical:.0%} of the median")
