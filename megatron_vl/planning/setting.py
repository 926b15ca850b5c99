"""What planning chooses: how a stage's model and batch are spread over the ranks."""

from dataclasses import dataclass

from megatron_vl.planning.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a stage. `layout` is checked against the topology (`planning.layout`)."""

    topology: Topology
    layout: str
    sequence_parallel: bool
    micro_batch_size: int  # rows
    recompute: str = "none"  # of config.parallel.RECOMPUTE, for decoder layers
    recompute_vision: bool = False
    vision_placement: str = "replicated"  # of config.parallel.VISION_PLACEMENTS
