"""Cluster files load and make sense; nonsense is refused by its field."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_vl.config.cluster import ClusterConfig, check_cluster
from megatron_vl.config.errors import UserError
from tests.support.clusters import CLUSTERS, cluster_of


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_file_makes_sense(name: str) -> None:
    cluster = cluster_of(name)
    check_cluster(cluster)
    assert cluster.name == name
    assert cluster.inside.bytes_per_second * cluster.devices_per_node >= cluster.between.bytes_per_second
    assert cluster.peak_flops > cluster.peak_flops_fp32


def changed(path: str, value: Any) -> ClusterConfig:
    """The A100 cluster with another value at `path`, a field or a field of a field."""
    cluster = cluster_of("a100_64x8")
    outer, _, inner = path.partition(".")
    return replace(cluster, **{outer: replace(getattr(cluster, outer), **{inner: value}) if inner else value})


@pytest.mark.parametrize(
    ("path", "value", "right"),
    [
        ("device_type", "tpu", "cuda"),
        ("peak_flops", 0.0, "above 0"),
        ("peak_flops_fp32", -1.0, "above 0"),
        ("memory_bytes", 0, "above 0"),
        ("memory_bytes_per_second", float("nan"), "finite"),
        ("num_nodes", 0, "above 0"),
        ("devices_per_node", -8, "above 0"),
        ("inside.bytes_per_second", 0.0, "above 0"),
        ("between.bytes_per_second", float("inf"), "finite"),
        ("between.latency_seconds", -1e-6, "at least 0"),
        ("efficiency.decoder", 1.2, "at most 1"),
        ("efficiency.memory", 0.0, "above 0"),
        ("tensor_exposed", 1.5, "at most 1"),
        ("tensor_exposed", -0.1, "at least 0"),
        ("straggler_factor", 0.9, "at least 1"),
        ("step_seconds", -1.0, "at least 0"),
    ],
)
def test_nonsense_is_refused_by_its_field(path: str, value: Any, right: str) -> None:
    with pytest.raises(UserError, match=rf"cluster\.{path}={value}: .*{right}".replace("+", r"\+")):
        check_cluster(changed(path, value))


@pytest.mark.parametrize(
    "path", ["inside.latency_seconds", "tensor_exposed", "step_seconds", "chunk_seconds"]
)
def test_what_may_be_nothing_may_be_zero(path: str) -> None:
    check_cluster(changed(path, 0.0))
