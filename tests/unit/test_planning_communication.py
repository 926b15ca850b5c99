"""Groups, their links, and volumes of collectives, against megatron-core's own groups and real collectives."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks, freeze
from megatron_vl.parallel.groups import build_groups, destroy_groups
from megatron_vl.planning.communication import (
    Volume,
    data_link,
    group_link,
    pipeline_link,
    ring_seconds,
    send_seconds,
    tensor_link,
    tensor_volume,
)
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.passes import chunk_units, passes
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Load
from tests.support.clusters import cluster_of, model_of
from tests.support.flops import small_model
from tests.support.ranks import run_ranks

A100 = cluster_of("a100_64x8")
NUM_TOKENS = 96
LAYOUT = "EtttL"


def ring_limit(groups: list[list[int]], per_node: int) -> float:
    """Bytes a second of the slowest of `groups`, each a ring in the order of its ranks, all at once: a node's groups
    that leave it share what it has; a group inside a node has its devices' own links."""
    leaving: dict[int, list[int]] = defaultdict(list)
    for index, ranks in enumerate(groups):
        nodes = {rank // per_node for rank in ranks}
        for node in nodes if len(nodes) > 1 else ():
            leaving[node].append(index)
    if not leaving:
        return A100.inside.bytes_per_second
    shared = min(A100.between.bytes_per_second / len(here) for here in leaving.values())
    members = max(sum(rank // per_node == 0 for rank in ranks) for ranks in groups)
    return min(shared, A100.inside.bytes_per_second) if members > 1 else shared


powers = st.sampled_from([1, 2, 4, 8, 16])


@given(tensor=powers, data=powers, pipeline=st.sampled_from([1, 2, 4]), per_node=st.sampled_from([1, 4, 8]))
def test_groups_are_limited_by_the_link_that_their_ranks_share(
    tensor: int, data: int, pipeline: int, per_node: int
) -> None:
    """Ranks as megatron-core groups them, counted node by node."""
    world = tensor * data * pipeline
    generator = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    topology = Topology(world_size=world, tensor_size=tensor, pipeline_size=pipeline)
    cluster = replace(A100, devices_per_node=per_node)
    found = {
        "tp": tensor_link(cluster, tensor),
        "dp": data_link(cluster, topology),
        "pp": pipeline_link(cluster, topology),
    }
    for token, size in (("tp", tensor), ("dp", data), ("pp", pipeline)):
        if size > 1:
            groups = generator.get_ranks(token)
            assert found[token].bytes_per_second == pytest.approx(ring_limit(groups, per_node)), token


def test_links_of_the_7b_model_on_64_nodes() -> None:
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2)
    assert tensor_link(A100, 2) == A100.inside
    assert data_link(A100, topology).bytes_per_second == A100.between.bytes_per_second / 2
    assert pipeline_link(A100, topology).bytes_per_second == A100.between.bytes_per_second / 8
    one_adapter = cluster_of("a100_pcie_1nic")
    assert group_link(one_adapter, 8, 64).bytes_per_second == one_adapter.between.bytes_per_second / 8


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_passes_every_share_but_its_own(size: int) -> None:
    """Played out: in every round each rank hands on the share that it got in the round before."""
    share_bytes, held, passed = 7.0, [{rank} for rank in range(size)], 0.0
    last = list(range(size))
    for _ in range(size - 1):
        last = [last[rank - 1] for rank in range(size)]
        passed += share_bytes
        for rank in range(size):
            held[rank].add(last[rank])
    assert all(len(shares) == size for shares in held)
    link = replace(A100.inside, latency_seconds=0.0)
    volume = Volume(num_bytes=size * share_bytes, num_rounds=1)
    assert ring_seconds(volume, link, size) == pytest.approx(passed / link.bytes_per_second)


def test_a_stage_sends_its_share_of_the_rows() -> None:
    load = Load(num_tokens=4096, num_images=0, num_pairs=0)
    whole = CostModel(model=model_of("deepseek_vl_7b"), tensor_size=2)
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2)
    latency = A100.between.latency_seconds
    seconds = send_seconds(load, whole, A100, topology) - latency
    assert seconds == pytest.approx(4096 * 4096 * 2 / 20e9)
    shared = send_seconds(load, replace(whole, sequence_parallel=True), A100, topology) - latency
    assert shared == pytest.approx(seconds / 2)
    assert send_seconds(load, whole, A100, Topology(world_size=512, tensor_size=2)) == 0


class RingBytes(TorchDispatchMode):
    """Adds up what the collectives of a process gather and reduce-scatter; an all-reduce is both."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__ if op.namespace == "c10d" else ""
        if name == "allreduce_":
            self.num_bytes += 2 * sum(_bytes(tensor) for tensor in args[0])
        elif name == "_allgather_base_":
            self.num_bytes += _bytes(args[0])
        elif name == "_reduce_scatter_base_":
            self.num_bytes += _bytes(args[1])
        elif name:
            raise NotImplementedError(name)
        return op(*args, **(kwargs or {}))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Told = tuple[int, int]  # bytes of a forward and of a backward pass
VOLUME_CASES = [
    (divided, trained, recompute)
    for divided in (False, True)
    for trained in (("adaptor",), ("embedding", "decoder", "head"))
    for recompute in ("none", "full")
]


def told_by_ranks(cases: list[tuple[bool, tuple[str, ...], str]]) -> list[Told]:
    """What two tensor-parallel ranks really gather and reduce."""
    return [_told(*case) for case in cases]


def _told(divided: bool, trained: tuple[str, ...], recompute: str) -> Told:
    model = small_model()
    topology = Topology(world_size=dist.get_world_size(), tensor_size=2)
    groups = build_groups(topology, 1, torch.device("cpu"))
    division = Division(topology=topology, layout=LAYOUT, sequence_parallel=divided)
    config = transformer_config(model.language, division, RecomputeConfig(language=recompute), "fp32")
    (chunk,) = build_chunks(
        config, model, BuildOptions(image_token=5), groups.collection, torch.device("cpu")
    )
    freeze(chunk, list(trained))
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    tokens = torch.full((1, NUM_TOKENS), 7)
    ends = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    with RingBytes() as forward:
        losses = chunk(tokens, None, tokens, ends, NUM_TOKENS)
    with RingBytes() as backward:
        losses.sum().backward()
    destroy_groups()
    return forward.num_bytes, backward.num_bytes


def test_volumes_are_those_of_real_collectives() -> None:
    ranks = run_ranks(2, told_by_ranks, VOLUME_CASES)
    assert ranks[0] == ranks[1]
    load = Load(num_tokens=NUM_TOKENS, num_images=0, num_pairs=0)
    for (divided, trained, recompute), told in zip(VOLUME_CASES, ranks[0], strict=True):
        costs = CostModel(model=small_model(), tensor_size=2, sequence_parallel=divided, element_bytes=4)
        forward = backward = 0.0
        for name, count in chunk_units(LAYOUT, costs.model).items():
            volume, run = tensor_volume(name, load, costs), passes(name, frozenset(trained))
            forward += count * volume.forward.num_bytes
            back = volume.input_gradient.num_bytes + volume.covered.num_bytes
            back += volume.weight_gradient.num_bytes * run.weight_gradient
            if name == "decoder_layer" and recompute == "full":
                back += volume.forward.num_bytes
            backward += count * back * run.any
        assert (forward, backward) == told, (divided, trained, recompute)
