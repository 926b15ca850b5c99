"""Nodes measured by ranks of this machine: every one meets both neighbours, and one that is silent is named."""

from datetime import timedelta

import torch.distributed as dist

from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.device.machine import Device
from megatron_vl.measure.node_check import RankReport, collect, measure_together, tell
from tests.support.ranks import run_ranks

LIMITS = NodeCheckConfig(message_mib=1, repeats=1)
NODES = ["n0", "n0", "n1", "n2"]


def measure() -> RankReport:
    report = RankReport(node=NODES[dist.get_rank()], matmul_flops=1.0)
    return measure_together(Device("cpu"), report, NODES, LIMITS)


def test_every_rank_measures_with_both_neighbours() -> None:
    for report in run_ranks(len(NODES), measure):
        assert len(report.bandwidths) == 2
        assert min(*report.bandwidths, report.world_bandwidth, report.seconds_since_epoch) > 0


def test_who_does_not_answer_is_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    for rank, node in enumerate(NODES):
        tell(store, "name", rank, RankReport(node=node))
    for rank in (0, 1, 3):
        tell(store, "alone", rank, RankReport(node=NODES[rank], matmul_flops=1.0))
    found = collect(store, "alone", len(NODES), seconds=0.1)
    assert [one.problem for one in found] == ["", "", "rank 2 did not answer", ""]
    assert found[2].node == "n1"
