"""Nodes measured by ranks of this machine: every one meets both neighbours, and one that is broken is named."""

import json
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.device.machine import Device
from megatron_vl.measure.node_check import collect, measure_together, tell
from megatron_vl.measure.node_judge import RankReport
from tests.distributed.test_device_process_group import clean_environment
from tests.support.ranks import run_ranks

LIMITS = NodeCheckConfig(message_mib=1, repeats=1)
NODES = ["n0", "n0", "n1", "n2"]


def measure() -> list[RankReport]:
    report, told = RankReport(node=NODES[dist.get_rank()], matmul_flops=1.0), []
    measure_together(Device("cpu"), report, NODES, LIMITS, told.append)
    return told


def test_every_rank_measures_with_both_neighbours() -> None:
    for told in run_ranks(len(NODES), measure):
        assert len(told) == 4  # three rounds of an odd ring, and all together
        assert len(told[-1].bandwidths) == 2
        assert min(*told[-1].bandwidths, told[-1].world_bandwidth, told[-1].seconds_since_epoch) > 0


def test_who_does_not_answer_is_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    for rank in (0, 1, 2):
        tell(store, "name", rank, RankReport(node=NODES[rank]))
    for rank in (0, 1):
        tell(store, "alone", rank, RankReport(node=NODES[rank], matmul_flops=1.0))
    found = collect(store, "alone", len(NODES), seconds=0.1)
    assert [one.problem for one in found] == ["", "", "rank 2 did not answer", "rank 3 did not answer"]
    assert [one.node for one in found] == ["n0", "n0", "n1", ""]


RANK = """
import json, os, sys, time
from pathlib import Path
from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.device.processes import rank_environment
from megatron_vl.measure import node_check
environment, flaw = rank_environment(), sys.argv[1]
if environment.rank == 1 and flaw == "no GPU":
    def pick_device(local_rank):
        raise UserError("local rank 0 has no GPU")
    node_check.pick_device = pick_device
if environment.rank == 1 and flaw == "no network":
    node_check._all_reduce_bandwidth = lambda *arguments: time.sleep(100)
limits = NodeCheckConfig(
    message_mib=1, write_mib=1, matmul_size=64, repeats=1, min_matmul_share=0, min_bandwidth_share=0,
    min_free_gib=0.001, timeout_seconds=float(sys.argv[2]),
)
verdict = node_check.check_nodes(environment, Path(sys.argv[3]), limits)
print(json.dumps(None if verdict is None else verdict.wrong), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("flaw", "seconds", "wrong"),
    [
        ("none", "30", {}),
        ("no GPU", "30", {"n1": ["local rank 0 has no GPU"]}),
        ("no network", "10", {"n0": ["rank 0 did not answer"], "n1": ["rank 1 did not answer"]}),
    ],
)
def test_one_verdict_whatever_is_broken(
    flaw: str, seconds: str, wrong: dict[str, list[str]], tmp_path: Path
) -> None:
    """Four nodes with one rank each; the first pairs are (n0, n1) and (n2, n3)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, flaw, seconds, str(tmp_path)],
            env=clean_environment(
                RANK=str(rank),
                LOCAL_RANK="0",
                WORLD_SIZE="4",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                SLURMD_NODENAME=f"n{rank}",
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [json.loads(rank.communicate(timeout=90)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert said == [wrong, None, None, None]
