"""The device of this process. No other file asks whether there is CUDA."""

import importlib.util
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import psutil
import torch

from megatron_vl.config.errors import UserError

_GPU_EXTRA = {"transformer_engine": "TransformerEngine's layers", "flash_attn": "flash attention"}


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What this process holds: on the host, and at most so far on its GPU, in tensors and reserved for them."""

    host_bytes: int
    device_peak_bytes: int | None
    device_reserved_bytes: int | None

    def to_numbers(self) -> tuple[float, float, float]:
        """For a message; -1 stands for None."""
        on_device = (self.device_peak_bytes, self.device_reserved_bytes)
        peak, reserved = (-1.0 if number is None else float(number) for number in on_device)
        return float(self.host_bytes), peak, reserved

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Self:
        """The inverse of `to_numbers`."""
        host, *on_device = map(int, numbers)
        peak, reserved = (None if number < 0 else number for number in on_device)
        return cls(host_bytes=host, device_peak_bytes=peak, device_reserved_bytes=reserved)


@dataclass(frozen=True)
class Device:
    """Where this process computes: the CPU, or one GPU of its host."""

    kind: Literal["cpu", "cuda"]
    local_rank: int = 0  # of this process on its host; the number of its GPU there

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.kind == "cuda" else torch.device("cpu")

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """Of torch.distributed."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.local_rank)

    def memory_bytes(self) -> int:
        """In tensors on a GPU; on CPU, the resident size of this process."""
        if self.kind == "cuda":
            return torch.cuda.memory_allocated(self.local_rank)
        return int(psutil.Process().memory_info().rss)

    def peak_memory_bytes(self) -> int:
        """The highest `memory_bytes` since the process started."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.local_rank)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def memory_use(self) -> MemoryUse:
        on_cuda = self.kind == "cuda"
        return MemoryUse(
            host_bytes=int(psutil.Process().memory_info().rss),
            device_peak_bytes=torch.cuda.max_memory_allocated(self.local_rank) if on_cuda else None,
            device_reserved_bytes=torch.cuda.max_memory_reserved(self.local_rank) if on_cuda else None,
        )


def pick_device(local_rank: int = 0) -> Device:
    """The GPU of this local rank where there is CUDA, else the CPU. A GPU becomes torch's current device.

    Raises:
        UserError: the host has fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return Device("cpu", local_rank)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
            "start at most as many processes on a host as it has GPUs"
        )
    # Read as the GPU's context is made. With one queue, work starts in the order in which it was given, which the
    # overlap of tensor-parallel communication with matmuls relies on (megatron-core's requirement before Blackwell).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    return Device("cuda", local_rank)


def require_gpu_extra(device: Device, transformer_engine: bool) -> None:
    """Check that what training on CUDA needs is installed.

    Args:
        device: of this process; a CPU needs nothing.
        transformer_engine: the config's `parallel.transformer_engine`; false asks for megatron-core's local
            layers, which need nothing.

    Raises:
        UserError: a package is missing; names it and the extra that has it.
    """
    if device.kind == "cpu" or not transformer_engine:
        return
    missing = [
        f"{name} ({use})" for name, use in _GPU_EXTRA.items() if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(
            f"training on CUDA needs {' and '.join(missing)}: docs/install.md has the commands; or set "
            "parallel.transformer_engine=false to use megatron-core's local layers"
        )
