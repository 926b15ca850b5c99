"""Bytes fetched per byte used on 64 and 512 nodes, and the counting itself against plain loops and formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.read_amplification import Cluster, Corpus, lane_reads, misses, mixed, simulate

ROOMY = "all samples shuffled, cache without bound"


@pytest.mark.parametrize("num_nodes", [64, 512])
def test_lanes_read_about_what_they_use(num_nodes: int) -> None:
    """A shuffle of all samples makes a node fetch every shard of which it has a sample."""
    per_shard = 32
    found = simulate(Cluster(num_nodes=num_nodes, samples_per_shard=per_shard))
    assert 1 < found["ranges"] <= 1.5
    assert 1 < found["shards"] <= 1.5
    expected = num_nodes * (1 - (1 - 1 / num_nodes) ** per_shard)
    assert found[ROOMY] == pytest.approx(expected, rel=0.05)
    assert found["all samples shuffled"] >= 0.9 * found[ROOMY]


@pytest.mark.parametrize("nodes_per_group", [2, 4])
def test_a_lane_whose_packs_run_on_several_nodes_is_fetched_by_each(nodes_per_group: int) -> None:
    found = simulate(Cluster(num_nodes=64, samples_per_shard=64, nodes_per_group=nodes_per_group))
    assert found["shards"] == pytest.approx(nodes_per_group, rel=0.05)
    assert found["ranges"] <= 1.5


def test_ranks_that_read_the_same_samples_share_shards_alone() -> None:
    found = simulate(Cluster(num_nodes=64, samples_per_shard=64, readers=4))
    assert found["ranges"] > 4
    assert found["shards"] <= 1.5


def test_pieces_of_documents_are_dear_by_ranges_alone() -> None:
    cluster = Cluster(num_nodes=64, samples_per_shard=64)
    documents, samples = simulate(cluster, documents=True), simulate(cluster)
    assert documents["ranges"] > 1.5 >= documents["shards"]
    both = mixed(samples, documents, text_ratio=0.7)
    assert max(both["ranges"], both["shards"]) <= 1.5
    assert mixed(samples, documents, text_ratio=0.0)["ranges"] == pytest.approx(samples["ranges"])


def test_the_nodes_of_a_cluster_read_each_sample_once() -> None:
    for nodes_per_group in (1, 2):
        cluster = Cluster(num_nodes=4, samples_per_shard=16, nodes_per_group=nodes_per_group)
        corpus = Corpus(cluster.lanes * cluster.shards_per_lane, 16, documents=False)
        read = np.concatenate(lane_reads(cluster, corpus))
        assert np.array_equal(np.sort(read), np.arange(len(corpus.tokens)))


@given(keys=st.lists(st.integers(0, 6)), room=st.integers(1, 5))
def test_misses_are_those_of_a_plain_list(keys: list[int], room: int) -> None:
    recent: list[int] = []
    expected = []
    for key in keys:
        expected.append(key not in recent)
        recent = [key, *(other for other in recent if other != key)][:room]
    assert misses(np.array(keys, dtype=np.int64), room).tolist() == expected
