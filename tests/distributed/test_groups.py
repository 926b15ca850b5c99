"""Process groups at size: few, each set of ranks once, made by no collective; and what small messages say."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vl.device.process_group import group_of, own_groups
from megatron_vl.measure.verify import planned_groups
from megatron_vl.measure.without_data import imagined_world
from megatron_vl.parallel.groups import build_groups, destroy_groups
from megatron_vl.planning.topology import Topology
from tests.support.ranks import run_ranks

WORLD = 4096
TOPOLOGY = Topology(world_size=WORLD, tensor_size=2, pipeline_size=4)
OF_ALL = (
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "all_gather",
    "all_reduce",
    "barrier",
)


@pytest.mark.parametrize("rank", [0, WORLD // 2, WORLD - 1])
def test_a_rank_of_a_large_world_is_in_few_groups(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective of all ranks")

    asked: Counter[tuple[int, ...]] = Counter()
    new_group = dist.new_group

    def counting(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
        assert backend is None, "a group of another kind than the world's, such as a twin on gloo"
        asked[tuple(ranks)] += 1
        return new_group(ranks, **options)

    for name in OF_ALL:
        monkeypatch.setattr(dist, name, refuse)
    monkeypatch.setattr(dist, "new_group", counting)
    with imagined_world(rank, WORLD):
        groups = build_groups(TOPOLOGY, seed=1, device=torch.device("cpu"))
        collection, planned = groups.collection, planned_groups(TOPOLOGY, rank)
        for name, group in (("tensor", collection.tp), ("pipeline", collection.pp), ("model", collection.mp)):
            assert dist.get_process_group_ranks(group) == planned[name]
        for group in (collection.dp, collection.dp_cp, collection.expt_dp):
            assert group is group_of(planned["data"])
        members = [tuple(dist.get_process_group_ranks(group)) for group in own_groups()]
        destroy_groups()
    assert len(members) == len(set(members)) <= 8  # megatron-core alone makes 17
    assert set(asked.values()) == {1}


def stages(topologies: list[Topology]) -> list[int]:
    """How many groups this rank is in after each of the stages."""
    numbers = []
    for topology in topologies:
        groups = build_groups(topology, seed=1, device=torch.device("cpu"))
        for group in (groups.collection.tp, groups.collection.pp, groups.collection.dp):
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert int(total) == group.size()
        numbers.append(len(own_groups()))
        destroy_groups()
    return numbers


def test_stages_share_their_groups() -> None:
    tensor, data = Topology(world_size=2, tensor_size=2), Topology(world_size=2)
    assert run_ranks(2, stages, [tensor, data, tensor]) == [[2, 2, 2]] * 2  # of both ranks, and of one


def largest_of(messages: list[list[int]]) -> list[int]:
    topology = Topology(world_size=4, tensor_size=2)
    groups = build_groups(topology, seed=1, device=torch.device("cpu"))
    told: list[int] = groups.control.maximum(torch.tensor(messages[dist.get_rank()])).tolist()
    return told


def test_hosts_of_a_replica_tell_each_other_their_largest() -> None:
    told = run_ranks(4, largest_of, [[1, -9], [0, -4], [7, 2**62], [2, 0]])
    assert told == [[1, -4], [1, -4], [7, 2**62], [7, 2**62]]
