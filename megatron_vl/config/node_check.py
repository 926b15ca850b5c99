"""What a node must reach before a job trains on it."""

from dataclasses import dataclass

from megatron_vl.config.errors import UserError


@dataclass(kw_only=True)
class NodeCheckConfig:
    """Shares are of the median over all nodes; a limit of 0 leaves that part out.

    `min_matmul_share`: of the rate of matrix products, of a node's slowest device. `min_bandwidth_share`: of the
    all-reduce with a neighbour. `max_clock_skew_seconds`: between a node's clock and the median.
    """

    enabled: bool = True
    min_matmul_share: float = 0.8
    min_bandwidth_share: float = 0.7
    max_clock_skew_seconds: float = 2.0
    min_free_gib: float = 100.0  # where run.dir lies, as each node sees it
    write_mib: int = 64  # that each node writes there and reads again
    matmul_size: int = 8192  # rows and columns
    message_mib: int = 256  # of an all-reduce
    repeats: int = 10  # of each measurement, whose median counts
    timeout_seconds: int = 300


def check_limits(config: NodeCheckConfig) -> None:
    """Raise UserError, naming the field, where a value makes no sense."""
    for field in ("min_matmul_share", "min_bandwidth_share"):
        if not 0.0 <= getattr(config, field) <= 1.0:
            raise UserError(f"node_check.{field}={getattr(config, field)}: must be from 0 to 1")
    for field in ("max_clock_skew_seconds", "min_free_gib", "write_mib"):
        if getattr(config, field) < 0:
            raise UserError(f"node_check.{field}={getattr(config, field)}: must be at least 0")
    for field in ("matmul_size", "message_mib", "repeats", "timeout_seconds"):
        if getattr(config, field) < 1:
            raise UserError(f"node_check.{field}={getattr(config, field)}: must be at least 1")
