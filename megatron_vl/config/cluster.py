"""A cluster as planning sees it: devices, links, and how much of their speed is reached.

Values and their sources are in `hydra_conf/cluster/`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass

from megatron_vl.config.errors import UserError

DEVICE_TYPES = ("cuda", "cpu")


@dataclass(kw_only=True)
class LinkConfig:
    """In one direction, as collectives reach it with large messages."""

    bytes_per_second: float = 0.0
    latency_seconds: float = 0.0  # of a message from one device to the next


@dataclass(kw_only=True)
class EfficiencyConfig:
    """Shares of the peak that work reaches: matrix products of the decoder, embedding and head; the decoder's attention
    kernel; all products of a tower; passes over memory, of the memory's bandwidth."""

    decoder: float = 0.0
    attention: float = 0.0
    siglip: float = 0.0
    sam: float = 0.0
    memory: float = 0.0


@dataclass(kw_only=True)
class ClusterConfig:
    """`inside` joins the devices of a node, for each device; `between` joins nodes, for all devices of a node together.

    `calibration` is a file of times that `launch.plan calibrate=true` measured: they take the place of peaks and
    efficiencies. `tensor_exposed`: what shows of tensor-parallel communication that runs beside matrix products.
    `straggler_factor`: how much longer than the typical device the slowest of a step takes.
    """

    name: str = ""
    device_type: str = "cuda"  # of DEVICE_TYPES
    peak_flops: float = 0.0  # per second, dense bf16
    peak_flops_fp32: float = 0.0
    memory_bytes: int = 0
    memory_bytes_per_second: float = 0.0
    num_nodes: int = 0
    devices_per_node: int = 0
    inside: LinkConfig = field(default_factory=LinkConfig)
    between: LinkConfig = field(default_factory=LinkConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    tensor_exposed: float = 0.0
    straggler_factor: float = 0.0
    step_seconds: float = 0.0  # fixed: agreement between all ranks, launching the step
    chunk_seconds: float = 0.0  # fixed, of every forward or backward pass over a pipeline chunk
    calibration: str | None = None

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node


MAY_BE_ZERO = ("latency_seconds", "step_seconds", "chunk_seconds", "tensor_exposed")


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise UserError, naming the field, unless the values can be those of a cluster."""
    if cluster.device_type not in DEVICE_TYPES:
        raise UserError(
            f"cluster.device_type={cluster.device_type}: must be one of {', '.join(DEVICE_TYPES)}"
        )
    for path, value in _numbers(cluster, "cluster"):
        name = path.rpartition(".")[2]
        lowest_is_fine = name in MAY_BE_ZERO and value == 0
        if not math.isfinite(value) or (value <= 0 and not lowest_is_fine):
            raise UserError(
                f"{path}={value}: must be a finite number {'of at least' if name in MAY_BE_ZERO else 'above'} 0"
            )
        if value > 1 and (name == "tensor_exposed" or path.startswith("cluster.efficiency.")):
            raise UserError(f"{path}={value}: a share, must be at most 1")
    if cluster.straggler_factor < 1:
        raise UserError(
            f"cluster.straggler_factor={cluster.straggler_factor}: must be at least 1 (1: all devices are alike)"
        )


def _numbers(config: object, path: str) -> Iterator[tuple[str, float]]:
    """Every number of a tree of dataclasses, with its path."""
    for entry in fields(config):  # type: ignore[arg-type]  # always a dataclass
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{path}.{entry.name}")
        elif isinstance(value, int | float):
            yield f"{path}.{entry.name}", value
