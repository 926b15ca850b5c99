"""Whether nodes are fit to train on: matrix products, all-reduces with neighbours, clocks, and where the run writes.

What a rank finds travels through the ranks' store, not through collectives: a rank that breaks is named.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.device.machine import Device, pick_device
from megatron_vl.device.process_group import group_of, join, meet
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.measure.node_judge import RankReport, Verdict, judge_alone, judge_together

MIB = 1 << 20
_NODES = "node_check/nodes"  # of all ranks in the store, once rank 0 has seen that each is well; else none
_READY, _ALL_READY = "node_check/ready", "node_check/all_ready"  # how many are to measure together; all are
_VERDICT = "node_check/verdict"  # rank 0 has come to one


def check_nodes(environment: RankEnvironment, folder: Path, limits: NodeCheckConfig) -> Verdict | None:
    """Measure the nodes of all ranks, first each rank alone, then, where all are well, together. Collective over the
    world. Returns the verdict on rank 0, None on others.

    A rank of a broken network may then still stand in a collective, so the process should end itself (`os._exit`).

    Raises:
        UserError: no node can write to `folder`, or it has too little space on all of them.
        PassingError: some rank has not come in time.
    """
    rank, seconds = environment.rank, limits.timeout_seconds
    device, problem = _device(environment.local_rank)
    store = meet(environment, timedelta(seconds=seconds), "node_check.timeout_seconds")
    report = RankReport(node=node_name(), device=device.kind, problem=problem)
    tell(store, "name", rank, report)
    if not problem:
        report = measure_alone(device, environment.local_rank == 0, folder, limits)
    tell(store, "alone", rank, report)
    verdict = None
    if rank == 0:
        reports = collect(store, "alone", environment.world_size, seconds)
        verdict = Verdict(reports=reports, wrong=judge_alone(reports, folder, limits))
        store.set(_NODES, json.dumps([] if verdict.wrong else [one.node for one in reports]))
    store.wait([_NODES], timedelta(seconds=2 * seconds))
    if nodes := json.loads(store.get(_NODES)):
        other = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        measuring = (other, environment, device, report, nodes, limits)
        threading.Thread(target=_join_and_measure, args=measuring, daemon=True).start()
        if rank == 0:
            verdict = _judge_rounds(store, nodes, limits)
            store.set(_VERDICT, "")
        store.wait([_VERDICT], timedelta(seconds=(len(rounds(nodes)) + 2) * seconds))
    store.set(_key("done", rank), "")
    if rank == 0:  # which serves the store
        with suppress(dist.DistStoreError):
            store.wait([_key("done", one) for one in range(environment.world_size)], timedelta(seconds=10))
    return verdict


def _join_and_measure(
    store: dist.Store,
    environment: RankEnvironment,
    device: Device,
    report: RankReport,
    nodes: list[str],
    limits: NodeCheckConfig,
) -> None:
    """In a thread of its own: a collective with a broken node may never end. With a connection of its own to the store:
    who waits holds one up. Raises nothing: who does not tell is silent."""
    pick_device(environment.local_rank)  # current in this thread, too
    # An error of NCCL's must not end the process before the verdict.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    rounds_told = 0

    def told(found: RankReport) -> None:
        nonlocal report, rounds_told
        report = found
        tell(store, f"round {rounds_told}", environment.rank, report)
        rounds_told += 1

    try:
        join(store, environment, device, timedelta(seconds=(len(rounds(nodes)) + 3) * limits.timeout_seconds))
        # They wait by the store: in a barrier of NCCL's one broken node would silence everyone.
        if store.add(_READY, 1) == environment.world_size:
            store.set(_ALL_READY, "")
        store.wait([_ALL_READY], timedelta(seconds=limits.timeout_seconds))
        measure_together(device, report, nodes, limits, told)
    except RuntimeError as error:
        tell(store, f"round {rounds_told}", environment.rank, replace(report, problem=str(error)))


def _judge_rounds(store: dist.Store, nodes: list[str], limits: NodeCheckConfig) -> Verdict:
    """After each round: where some do not answer, or have a problem, later rounds would only show more of the same."""
    for number in range(len(rounds(nodes)) + 1):
        reports = collect(store, f"round {number}", len(nodes), limits.timeout_seconds)
        if any(report.problem for report in reports):
            break
    return Verdict(reports=reports, wrong=judge_together(reports, limits))


def node_name() -> str:
    """As SLURM calls it, where SLURM started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def measure_alone(device: Device, first_of_node: bool, folder: Path, limits: NodeCheckConfig) -> RankReport:
    """What a rank can find by itself; the first one of a node also writes to `folder`. Errors become the problem."""
    report = RankReport(node=node_name(), device=device.kind)
    try:
        if first_of_node:
            _await_folder(folder)
            write_and_read(folder / f".node_check.{report.node}", limits.write_mib * MIB)
            report = replace(report, free_bytes=shutil.disk_usage(folder).free)
    except OSError as error:
        return replace(report, problem=f"cannot use the run's folder: {error}", free_bytes=0)
    try:
        return replace(report, matmul_flops=matmul_flops(device, limits.matmul_size, limits.repeats))
    except RuntimeError as error:
        return replace(report, problem=str(error))


def measure_together(
    device: Device,
    report: RankReport,
    nodes: Sequence[str],
    limits: NodeCheckConfig,
    told: Callable[[RankReport], None],
) -> None:
    """What takes all ranks, whose `nodes` are given in their order, once all have met: clocks, the rounds of pairs,
    then all at once. Each ends with a call of `told`. Collective over the world."""
    report = replace(report, seconds_since_epoch=time.time())
    values = torch.ones(limits.message_mib * MIB // 4, device=device.torch_device)
    groups = [  # made before any is used, as all ranks make all of them
        [group_of([rank for rank, node in enumerate(nodes) if node in pair]) for pair in pairs]
        for pairs in rounds(nodes)
    ]
    for pairs, of_pairs in zip(rounds(nodes), groups, strict=True):
        for pair, group in zip(pairs, of_pairs, strict=True):
            if report.node in pair:
                rate = _all_reduce_bandwidth(device, values, group, limits.repeats)
                report = replace(report, bandwidths=(*report.bandwidths, rate))
        told(report)
    world = _all_reduce_bandwidth(device, values, group_of(range(len(nodes))), limits.repeats)
    told(replace(report, world_bandwidth=world))


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Each of the ranks' `nodes` with either neighbour in a ring, in one pair a round: who is slow with both is slow
    itself."""
    nodes = list(dict.fromkeys(nodes))
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
    return [_read(store, key) or _silent(store, rank) for rank, key in enumerate(keys)]


def _silent(store: dist.Store, rank: int) -> RankReport:
    named = _read(store, _key("name", rank)) or RankReport(node="")
    return replace(named, problem=f"rank {rank} did not answer")


def matmul_flops(device: Device, size: int, repeats: int) -> float:
    """Floating-point operations per second of products as the device computes them in training."""
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    square = torch.randn(size, size, device=device.torch_device, dtype=dtype)
    return 2 * size**3 / _median_seconds(device, lambda: torch.mm(square, square), repeats)


def _await_folder(folder: Path) -> None:
    """NFS may still say that there is none, up to a minute after another node has made it."""
    deadline = time.monotonic() + 60
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(1)


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


def _read(store: dist.Store, key: str) -> RankReport | None:
    if not store.check([key]):
        return None
    values = json.loads(store.get(key))
    return RankReport(**{**values, "bandwidths": tuple(values["bandwidths"])})
