"""What ranks tell each other, by volume and link: within tensor-, data- and pipeline-parallel groups.

Ranks are numbered as megatron-core does it: tensor parallel fastest, then data, then pipeline parallel; and node by
node. Collectives run as rings: gathering or reduce-scattering n shares of V bytes in all passes (n - 1)/n V over each
device's link; an all-reduce is both.
"""

from dataclasses import dataclass, field

from megatron_vl.config.cluster import ClusterConfig, LinkConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Load

FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes that collectives gather or reduce-scatter, whole, and how many rounds of the ring they make."""

    num_bytes: float = 0.0
    num_rounds: float = 0.0

    def __mul__(self, times: float) -> "Volume":
        return Volume(num_bytes=times * self.num_bytes, num_rounds=times * self.num_rounds)


SILENCE = Volume()


@dataclass(frozen=True, kw_only=True)
class UnitVolume:
    """Tensor-parallel collectives of each pass over a unit. `covered` are those of the input gradient that run beside
    the weight gradient's product, where there is one; the weight gradient's own run beside the input gradient's."""

    forward: Volume = field(default=SILENCE)
    input_gradient: Volume = field(default=SILENCE)
    covered: Volume = field(default=SILENCE)
    weight_gradient: Volume = field(default=SILENCE)


def ring_seconds(volume: Volume, link: LinkConfig, group_size: int) -> float:
    """Of collectives within a group on `link`."""
    passed = (group_size - 1) / group_size * volume.num_bytes / link.bytes_per_second
    return passed + volume.num_rounds * (group_size - 1) * link.latency_seconds


def tensor_volume(name: str, load: Load, costs: CostModel) -> UnitVolume:
    """What unit `name` gathers and reduces among its tensor-parallel ranks.

    A decoder layer has two pairs of divided products. Without sequence parallelism, their outputs are all-reduced, and
    so are the gradients of their inputs. With it, rows are gathered before and reduce-scattered behind each pair,
    gradients likewise, and the weight gradients gather once more what forward had gathered. Vision is whole everywhere
    and tells nothing.
    """
    hidden_bytes = load.num_tokens * costs.model.language.hidden_size * costs.element_bytes
    ring = Volume(num_bytes=hidden_bytes, num_rounds=1)
    divided = costs.sequence_parallel
    if costs.tensor_size == 1:
        return UnitVolume()
    if name == "decoder_layer" and divided:
        return UnitVolume(
            forward=ring * 4, input_gradient=ring * 2, covered=ring * 2, weight_gradient=ring * 2
        )
    if name == "decoder_layer":
        return UnitVolume(forward=ring * 4, covered=ring * 4)
    if name == "embedding":  # its rows are whole until stage zero is left
        return UnitVolume(forward=ring * 2, input_gradient=ring if divided else SILENCE)
    if name == "head" and divided:
        return UnitVolume(forward=ring, covered=ring, weight_gradient=ring)
    if name == "head":
        return UnitVolume(covered=ring * 2)
    if name == "loss":  # every token's largest logit; then its sum and its label's logit
        return UnitVolume(forward=Volume(num_bytes=6 * load.num_tokens * FP32_BYTES, num_rounds=4))
    return UnitVolume()


def tensor_link(cluster: ClusterConfig, tensor_size: int) -> LinkConfig:
    return group_link(cluster, 1, tensor_size)


def data_link(cluster: ClusterConfig, topology: Topology) -> LinkConfig:
    return group_link(cluster, topology.tensor_size, topology.data_size)


def pipeline_link(cluster: ClusterConfig, topology: Topology) -> LinkConfig:
    """Neighbours are tensor x data ranks apart."""
    return group_link(cluster, topology.tensor_size * topology.data_size, topology.pipeline_size)


def group_link(cluster: ClusterConfig, stride: int, group_size: int) -> LinkConfig:
    """The link that limits one of the groups whose ranks lie `stride` apart, while all such groups communicate.

    Inside a node every device has its link. A ring over nodes leaves each node once, so the groups that a node takes
    part in share what the node has; with several devices in a node, a group has several devices' share.
    """
    per_node = cluster.devices_per_node
    if stride * (group_size - 1) < per_node:
        return cluster.inside
    members = max(1, per_node // stride)
    shared = cluster.between.bytes_per_second * members / per_node
    limit = min(shared, cluster.inside.bytes_per_second) if members > 1 else shared
    return LinkConfig(bytes_per_second=limit, latency_seconds=cluster.between.latency_seconds)


def send_seconds(load: Load, costs: CostModel, cluster: ClusterConfig, topology: Topology) -> float:
    """A microbatch's hidden states, or their gradients, from one pipeline rank to the next."""
    if topology.pipeline_size == 1:
        return 0.0
    num_bytes = load.num_tokens * costs.model.language.hidden_size * costs.element_bytes
    link = pipeline_link(cluster, topology)
    return num_bytes / costs.sequence_share / link.bytes_per_second + link.latency_seconds
