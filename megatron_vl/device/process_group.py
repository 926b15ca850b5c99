"""Joining the process group of all ranks, and leaving it."""

import os
from datetime import timedelta

import torch.distributed as dist

from megatron_vl.device.machine import Device
from megatron_vl.device.processes import RankEnvironment

_LOOPBACK = ("127.0.0.1", "localhost")


def initialize_distributed(environment: RankEnvironment, device: Device, timeout_seconds: float) -> None:
    """Join the process group of all ranks.

    Args:
        timeout_seconds: after which it is an error that some rank has not joined, here or in a collective.
    """
    if device.backend == "gloo" and environment.master_addr in _LOOPBACK:
        # Gloo would pick the interface of the host's name, which may lead nowhere, or into the open network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_seconds)
    here = environment.store_descriptor is not None
    dist.init_process_group(
        backend=device.backend,
        init_method=None if here else f"tcp://{environment.master_addr}:{environment.master_port}",
        store=_local_store(environment, timeout) if here else None,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        device_id=device.torch_device if device.kind == "cuda" else None,
    )


def _local_store(environment: RankEnvironment, timeout: timedelta) -> dist.TCPStore:
    """Served by rank 0, on the socket that listens since before the ranks began: they cannot miss it."""
    serves = environment.rank == 0
    return dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        is_master=serves,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=environment.store_descriptor if serves else None,
    )


def destroy_distributed() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
