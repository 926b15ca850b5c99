"""The process group of all ranks: joining it within a time, smaller groups, how long they wait, and leaving."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megatron_vl.config.errors import PassingError
from megatron_vl.device.machine import Device
from megatron_vl.device.processes import RankEnvironment

_LOOPBACK = ("127.0.0.1", "localhost")
_JOINED, _OUTCOME = "megatron_vl/joined", "megatron_vl/outcome"  # keys of the ranks' store
_MAX_NAMED = 16  # missing ranks, in a message


@dataclass
class _World:
    """The groups of one world by their ranks, None for those that this process is not in."""

    everyone: dist.ProcessGroup
    timeout: timedelta | None = None  # None: torch's own
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict)


_worlds: list[_World] = []  # the present one, if it has been asked for


def initialize_distributed(environment: RankEnvironment, device: Device, timeout_seconds: float) -> None:
    """Join the process group of all ranks.

    Args:
        timeout_seconds: how long ranks wait for each other, here and in collectives, until `set_timeout`.

    Raises:
        PassingError: some rank has not come in time, or rank 0 cannot be reached; said by every rank that came.
    """
    timeout = timedelta(seconds=timeout_seconds)
    join(meet(environment, timeout, "run.start_timeout_seconds"), environment, device, timeout)


def join(store: dist.Store, environment: RankEnvironment, device: Device, timeout: timedelta) -> None:
    """Join the process group of all ranks that met at this store."""
    if device.backend == "gloo" and environment.master_addr in _LOOPBACK:
        # Gloo would pick the interface of the host's name, which may lead nowhere, or into the open network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Without device_id: with it, every rank of the world would take part in splitting every group's communicator off
    # the world's, thousands of times. So each communicator is made by its members, when they first use it.
    dist.init_process_group(
        backend=device.backend,
        store=store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
    _here().timeout = timeout


def group_of(ranks: Sequence[int], **_options: object) -> dist.ProcessGroup | None:
    """The group of these ranks; None for those that are not in it. Collective over the world.

    Made when it is first asked for, and kept to the world's end: the many groups of megatron-core that have the same
    ranks are one, for which one communicator, or one thread of gloo that looks for messages, will do. Stands in for
    megatron-core's `create_group`, whose further options (time-out, twins on gloo, NCCL's values) are not used.
    """
    world, members = _here(), tuple(ranks)
    if len(members) == world.everyone.size():
        return world.everyone
    if members not in world.groups:
        made = dist.new_group(list(members), timeout=world.timeout)
        world.groups[members] = made if isinstance(made, dist.ProcessGroup) else None
    return world.groups[members]


def own_groups() -> list[dist.ProcessGroup]:
    """All groups that this process is in, that of all ranks first."""
    world = _here()
    return [world.everyone, *(group for group in world.groups.values() if group is not None)]


def set_timeout(seconds: float) -> None:
    """From now on ranks wait so long for each other in a collective of any group, also of those still to be made."""
    _here().timeout = timedelta(seconds=seconds)
    for group in own_groups():
        group.set_timeout(timedelta(seconds=seconds))


def destroy_distributed() -> None:
    """Leave the process group, if one was joined."""
    _worlds.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _here() -> _World:
    """Of the present process group, whoever joined it. Raises RuntimeError where there is none."""
    everyone = dist.group.WORLD
    if everyone is None:
        raise RuntimeError("no process group has been joined")
    if not _worlds or _worlds[0].everyone is not everyone:
        _worlds[:] = [_World(everyone)]
    return _worlds[0]


def meet(environment: RankEnvironment, timeout: timedelta, field: str) -> dist.Store:
    """The ranks' store, once all ranks have come to it. Raises PassingError naming those that have not, and the `field`
    of the configuration that gives the time."""
    address = f"{environment.master_addr}:{environment.master_port}"
    try:
        store = _open_store(environment, timeout)
        store.set(f"{_JOINED}/{environment.rank}", "")
        if environment.rank == 0:  # alone, lest every rank asks for every other one
            store.set(_OUTCOME, _missing(store, environment.world_size, timeout))
        store.wait([_OUTCOME], 2 * timeout)
        missing = store.get(_OUTCOME).decode()
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise PassingError(
            f"rank {environment.rank} did not meet rank 0 at {address} within {field}="
            f"{timeout.total_seconds():g} ({reason}); see the log of rank 0, or wait longer"
        ) from error
    if missing:
        raise PassingError(
            f"{missing} of {environment.world_size} did not come to {address} within {field}="
            f"{timeout.total_seconds():g}; see their logs and nodes, or wait longer"
        )
    return store


def _open_store(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    """Served by rank 0, on a socket that listens since before the ranks began where there is one; under torchrun by
    its agent, who keeps it over restarts: each has keys of its own."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = environment.rank == 0 and not by_agent
    store = dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        is_master=serves,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=environment.store_descriptor if serves else None,
    )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start-{restart}", store) if by_agent else store


def _missing(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """Waits for all ranks. Returns the names of those that have not come, or nothing."""
    keys = [f"{_JOINED}/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        ranks = [rank for rank, key in enumerate(keys) if not store.check([key])]
        more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
        word = "rank" if len(ranks) == 1 else "ranks"
        return f"{word} {', '.join(map(str, ranks[:_MAX_NAMED]))}{more}" if ranks else ""
    return ""
