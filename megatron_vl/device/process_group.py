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
    dist.init_process_group(
        backend=device.backend,
        init_method=f"tcp://{environment.master_addr}:{environment.master_port}",
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device.torch_device if device.kind == "cuda" else None,
    )


def destroy_distributed() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
