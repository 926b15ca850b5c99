"""Seconds of each pass over a unit: the face that schedules are timed by, and times from a cluster's figures."""

from dataclasses import dataclass
from typing import Protocol

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.planning.communication import Volume, ring_seconds, tensor_link, tensor_volume
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.work import Work
from megatron_vl.planning.workload import Load

# AdamW on one parameter's shard, in fp32: gradient read for the norm, scaled (read, written) and read again; two
# moments and the main parameter read and written; and the parameter written.
UPDATE_BYTES = 4 * 4 + 3 * 2 * 4
ZEROED_BYTES = 4  # the gradient buffer, before the step


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    forward: float
    input_gradient: float
    weight_gradient: float


class Timing(Protocol):
    """What times units on one rank. Names are those of `planning.cost.UNITS`."""

    def unit(self, name: str, load: Load) -> PassSeconds:
        """One unit on one rank, with the tensor-parallel communication that nothing hides."""
        ...

    def update(self, num_trained: float, data_size: int) -> float:
        """What follows the gradients of a rank's trained parameters: norm, clipping and update of its shard among
        `data_size` ranks, and clearing the buffer."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClusterTiming:
    """Times from a cluster's figures: each kind of work at the share of the peak that it reaches, one after another.

    Of communication beside a product, the cluster's `tensor_exposed` shows. A weight gradient's seconds have been
    reduced by what its product hides of the input gradient's communication, which is whole where weights are frozen.
    """

    cluster: ClusterConfig
    costs: CostModel

    def unit(self, name: str, load: Load) -> PassSeconds:
        """See Timing."""
        work = self.costs.unit(name, load)
        told = tensor_volume(name, load, self.costs)
        weight_gradient = self._compute(name, work.weight_gradient)
        covered, shown = self._tell(told.covered), self.cluster.tensor_exposed
        hidden = min((1 - shown) * covered, weight_gradient)
        return PassSeconds(
            forward=self._compute(name, work.forward) + self._tell(told.forward),
            input_gradient=self._compute(name, work.input_gradient)
            + self._tell(told.input_gradient)
            + covered,
            weight_gradient=weight_gradient - hidden + shown * self._tell(told.weight_gradient),
        )

    def update(self, num_trained: float, data_size: int) -> float:
        """See Timing."""
        num_bytes = num_trained * updated_bytes(data_size, self.costs.element_bytes)
        return num_bytes / (self.cluster.memory_bytes_per_second * self.cluster.efficiency.memory)

    def _tell(self, volume: Volume) -> float:
        size = self.costs.tensor_size
        return ring_seconds(volume, tensor_link(self.cluster, size), size)

    def _compute(self, name: str, work: Work) -> float:
        efficiency = self.cluster.efficiency
        tower = name.partition("_")[0]
        products = {"siglip": efficiency.siglip, "sam": efficiency.sam}.get(tower, efficiency.decoder)
        kernel = products if tower in ("siglip", "sam") else efficiency.attention
        peak = self.cluster.peak_flops if self.costs.element_bytes == 2 else self.cluster.peak_flops_fp32
        bandwidth = self.cluster.memory_bytes_per_second * efficiency.memory
        seconds = (
            work.matmul_flops / (peak * products)
            + work.attention_flops / (peak * kernel)
            + work.moved_bytes / bandwidth
        )
        return seconds * self.cluster.straggler_factor


def updated_bytes(data_size: int, element_bytes: int) -> float:
    """Moved bytes of an update, per trained parameter of a rank."""
    return ZEROED_BYTES + (UPDATE_BYTES + element_bytes) / data_size
