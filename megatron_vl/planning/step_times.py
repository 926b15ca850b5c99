"""What a step takes beside its microbatches: gathering parameters, reducing gradients, updating weights.

The distributed optimizer: every data-parallel rank reduces its share of the gradients (fp32), updates it, and gathers
the others' new parameters. Each chunk reduces its gradients at once when its last backward pass is done, and gathers
its parameters before its first forward pass; what of that shows is for who knows those times to say.
"""

from dataclasses import dataclass

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.communication import Volume, data_link, ring_seconds
from megatron_vl.planning.parameters import unit_parameters
from megatron_vl.planning.passes import PART, chunk_units
from megatron_vl.planning.timing import Timing
from megatron_vl.planning.topology import Topology

GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One pipeline rank. Chunks are given as their E, t and L."""

    model: ModelConfig
    trained: frozenset[str]
    topology: Topology
    cluster: ClusterConfig
    timing: Timing
    element_bytes: int = 2

    def reduce_seconds(self, chunk: str) -> float:
        """Reduce-scatter of a chunk's gradients over the data-parallel group."""
        return self._ring(self.trained_parameters(chunk) * GRADIENT_BYTES)

    def gather_seconds(self, chunk: str) -> float:
        """All-gather of a chunk's trained parameters over the data-parallel group."""
        return self._ring(self.trained_parameters(chunk) * self.element_bytes)

    def optimizer_seconds(self, chunks: list[str]) -> float:
        """Norm, clipping and update of this rank's shard, clearing the gradients, and what every step takes."""
        trained = sum(self.trained_parameters(chunk) for chunk in chunks)
        return self.timing.update(trained, self.topology.data_size) + self.cluster.step_seconds

    def trained_parameters(self, chunk: str) -> int:
        """Of one rank's part of a chunk."""
        counts = unit_parameters(self.model, self.topology.tensor_size)
        units = chunk_units(chunk, self.model)
        return sum(count * counts[name] for name, count in units.items() if PART.get(name) in self.trained)

    def _ring(self, num_bytes: float) -> float:
        size = self.topology.data_size
        volume = Volume(num_bytes=num_bytes, num_rounds=1 if num_bytes else 0)
        return ring_seconds(volume, data_link(self.cluster, self.topology), size)
