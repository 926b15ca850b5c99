"""Whether nodes are fit to train on: matrix products, all-reduces with neighbours, clocks, and where the run writes.

What a rank finds travels through the ranks' store, not through collectives: a rank that breaks is named.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.device.machine import Device, pick_device
from megatron_vl.device.process_group import destroy_distributed, group_of, initialize_distributed
from megatron_vl.device.processes import RankEnvironment

MIB, GIB = 1 << 20, 1 << 30
_NODES = "node_check/nodes"  # of all ranks in the store, once rank 0 has seen that each is well; else none


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found. Rates are per second; `problem` is an error that ended its measurements."""

    node: str
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


def check_nodes(environment: RankEnvironment, folder: Path, limits: NodeCheckConfig) -> Verdict | None:
    """Measure the nodes of all ranks, first each rank alone, then, where all are well, together. Collective over the
    world, which is joined for it. Returns the verdict on rank 0, None on others.

    Raises:
        UserError: no node can write to `folder`, or it has too little space on all of them.
    """
    device, problem = _device(environment.local_rank)
    initialize_distributed(environment, device, limits.timeout_seconds)
    report = RankReport(node=node_name(), problem=problem)
    store: dist.Store = dist.distributed_c10d._get_default_store()
    tell(store, "name", environment.rank, report)
    if not problem:
        report = measure_alone(device, environment.local_rank == 0, folder, limits)
    verdict = _confer(store, environment, device, report, folder, limits)
    store.set(_key("done", environment.rank), "")
    if environment.rank == 0:  # which serves the store
        with suppress(dist.DistStoreError):
            store.wait([_key("done", rank) for rank in range(environment.world_size)], timedelta(seconds=10))
    destroy_distributed()
    return verdict


def _confer(
    store: dist.Store,
    environment: RankEnvironment,
    device: Device,
    report: RankReport,
    folder: Path,
    limits: NodeCheckConfig,
) -> Verdict | None:
    rank, size, seconds = environment.rank, environment.world_size, limits.timeout_seconds
    tell(store, "alone", rank, report)
    if rank == 0:
        reports = collect(store, "alone", size, seconds)
        wrong = judge_alone(reports, folder, limits)
        store.set(_NODES, json.dumps([] if wrong else [one.node for one in reports]))
        if wrong:
            return Verdict(reports=reports, wrong=wrong)
    store.wait([_NODES], timedelta(seconds=2 * seconds))
    nodes = json.loads(store.get(_NODES))
    if not nodes:
        return None
    tell(store, "together", rank, measure_together(device, report, nodes, limits))
    if rank != 0:
        return None
    reports = collect(store, "together", size, seconds)
    return Verdict(reports=reports, wrong=judge_together(reports, limits))


def node_name() -> str:
    """As SLURM calls it, where SLURM started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def measure_alone(device: Device, first_of_node: bool, folder: Path, limits: NodeCheckConfig) -> RankReport:
    """What a rank can find by itself; the first one of a node also writes to `folder`. Errors become the problem."""
    report = RankReport(node=node_name())
    try:
        if first_of_node:
            write_and_read(folder / f".node_check.{report.node}", limits.write_mib * MIB)
            report = replace(report, free_bytes=shutil.disk_usage(folder).free)
    except OSError as error:
        return replace(report, problem=f"cannot use the run's folder: {error}", free_bytes=0)
    try:
        return replace(report, matmul_flops=matmul_flops(device, limits.matmul_size, limits.repeats))
    except RuntimeError as error:
        return replace(report, problem=str(error))


def measure_together(
    device: Device, report: RankReport, nodes: Sequence[str], limits: NodeCheckConfig
) -> RankReport:
    """What takes all ranks, whose `nodes` are given in their order. Collective over the world."""
    dist.barrier()
    now = time.time()
    values = torch.ones(limits.message_mib * MIB // 4, device=device.torch_device)
    everyone = group_of(range(len(nodes)))
    world = _all_reduce_bandwidth(device, values, everyone, limits.repeats)
    mine = []
    for pairs in rounds(list(dict.fromkeys(nodes))):
        groups = [group_of([rank for rank, node in enumerate(nodes) if node in pair]) for pair in pairs]
        for pair, group in zip(pairs, groups, strict=True):
            if report.node in pair:
                mine.append(_all_reduce_bandwidth(device, values, group, limits.repeats))
    return replace(report, seconds_since_epoch=now, world_bandwidth=world, bandwidths=tuple(mine))


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Each node with either neighbour in a ring, in one pair a round: who is slow with both is slow itself."""
    count = len(nodes)
    if count < 3:
        return [[tuple(nodes)]]
    pairs: list[tuple[str, ...]] = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    even = count - count % 2
    return [pairs[0:even:2], pairs[1:even:2]] + ([pairs[even:]] if count % 2 else [])


def collect(store: dist.Store, name: str, world_size: int, seconds: float) -> list[RankReport]:
    """Of all ranks, in their order. Who does not tell within that time has that problem."""
    keys = [_key(name, rank) for rank in range(world_size)]
    with suppress(dist.DistStoreError):  # those that have come are read
        store.wait(keys, timedelta(seconds=seconds))
    told = [store.check([key]) for key in keys]
    return [
        _read(store, key)
        if has
        else replace(_read(store, _key("name", rank)), problem=f"rank {rank} did not answer")
        for rank, (key, has) in enumerate(zip(keys, told, strict=True))
    ]


def judge_alone(reports: Sequence[RankReport], folder: Path, limits: NodeCheckConfig) -> dict[str, list[str]]:
    """What is wrong with each node that is not fit, of `reports` of all ranks in their order.

    Raises:
        UserError: the folder cannot be used, or has too little space, on all nodes: it is not theirs to mend.
    """
    wrong: dict[str, list[str]] = {}
    for report in reports:
        if report.problem:
            wrong.setdefault(report.node, []).append(report.problem)
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
    """What is wrong with each node that is not fit, of `reports` of all ranks in their order."""
    wrong: dict[str, list[str]] = {}
    for report in reports:
        if report.problem:
            wrong.setdefault(report.node, []).append(report.problem)
    rates = _by_node(reports, best_bandwidth)
    _add_slow(wrong, rates, limits.min_bandwidth_share, lambda rate: f"all-reduce at {rate / 1e9:.2f} GB/s")
    clocks = _by_node(reports, lambda ranks: ranks[0].seconds_since_epoch)
    typical = median(clocks.values())
    for node, clock in clocks.items():
        if limits.max_clock_skew_seconds and abs(clock - typical) > limits.max_clock_skew_seconds:
            wrong.setdefault(node, []).append(f"its clock is {clock - typical:+.1f} s off")
    return wrong


def best_bandwidth(ranks: Sequence[RankReport]) -> float:
    """Of a node's ranks: the slowest one, in the node's best round."""
    return max(
        (min(of_round) for of_round in zip(*(one.bandwidths for one in ranks), strict=True)), default=0.0
    )


def matmul_flops(device: Device, size: int, repeats: int) -> float:
    """Floating-point operations per second of products as the device computes them in training."""
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    square = torch.randn(size, size, device=device.torch_device, dtype=dtype)
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(square, square), repeats)


def write_and_read(path: Path, num_bytes: int) -> None:
    """Raises OSError where that cannot be done, or gives other bytes."""
    data = os.urandom(num_bytes)
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != data:
            raise OSError(f"{path}: other bytes than were written")
    finally:
        path.unlink(missing_ok=True)


def _all_reduce_bandwidth(
    device: Device, values: torch.Tensor, group: dist.ProcessGroup | None, repeats: int
) -> float:
    """Bytes per second that each rank sends and receives."""
    seconds = _median_seconds(device, lambda: dist.all_reduce(values, dist.ReduceOp.MAX, group), repeats)
    size = dist.get_world_size(group)
    return values.numel() * 4 * 2 * max(size - 1, 1) / size / seconds


def _median_seconds(device: Device, call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for number in range(repeats + 2):
        device.synchronize()
        begun = time.perf_counter()
        call()
        device.synchronize()
        if number >= 2:  # the first ones make communicators and choose kernels
            seconds.append(time.perf_counter() - begun)
    return median(seconds)


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


def _device(local_rank: int) -> tuple[Device, str]:
    """This rank's device, or why it has none: a GPU may be gone from a node."""
    try:
        return pick_device(local_rank), ""
    except (UserError, RuntimeError) as error:
        return Device("cpu", local_rank), str(error)


def _key(name: str, rank: int) -> str:
    return f"node_check/{name}/{rank}"


def tell(store: dist.Store, name: str, rank: int, report: RankReport) -> None:
    """For `collect` on rank 0."""
    store.set(_key(name, rank), json.dumps(asdict(report)))


def _read(store: dist.Store, key: str) -> RankReport:
    values = json.loads(store.get(key))
    return RankReport(**{**values, "bandwidths": tuple(values["bandwidths"])})
