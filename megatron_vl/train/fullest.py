"""The rank that has least memory left: of all ranks alike, the one that a run would fail on first."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.device.machine import MemoryUse


@dataclass(frozen=True, kw_only=True)
class Fullest:
    """The rank that holds most on its GPU; without GPUs, most on its host."""

    rank: int
    memory: MemoryUse


def fullest(memory: Sequence[MemoryUse]) -> Fullest:
    """By rank; of equal ones the first."""
    rank = max(
        range(len(memory)), key=lambda one: (memory[one].device_reserved_bytes or 0, memory[one].host_bytes)
    )
    return Fullest(rank=rank, memory=memory[rank])
