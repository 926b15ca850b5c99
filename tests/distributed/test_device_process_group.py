"""Real launchers on this machine: torchrun, and the variables of srun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

RANK = """
from megatron_vl.device.processes import die_with_parent, rank_environment
die_with_parent()
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from megatron_vl.device.machine import Device
from megatron_vl.device.process_group import destroy_distributed, initialize_distributed
environment = rank_environment()
initialize_distributed(environment, Device("cpu"), timeout_seconds=60)
total = torch.ones(1) * (environment.rank + 1)
dist.all_reduce(total)
report = Path(sys.argv[1]) / f"rank-{environment.rank}"
report.write_text(f"{os.getpid()} {int(total)} {os.environ['GLOO_SOCKET_IFNAME']}")
time.sleep(float(sys.argv[2]))
destroy_distributed()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def start_torchrun(program: Path, sleep_seconds: float) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(program), str(program.parent), str(sleep_seconds)]
    return subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)


def reports(folder: Path, launched: list[subprocess.Popen[bytes]]) -> list[list[str]]:
    """What both ranks wrote: process id, sum of all ranks, gloo's interface."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [path.read_text().split() for path in sorted(folder.glob("rank-*"))]
        if len(texts) == 2 and all(len(text) == 3 for text in texts):
            return texts
        assert not any(process.poll() for process in launched), "a launched process failed"
        time.sleep(0.05)
    raise TimeoutError("the ranks did not report")


def test_torchrun(program: Path) -> None:
    launcher = start_torchrun(program, sleep_seconds=0)
    assert [report[1:] for report in reports(program.parent, [launcher])] == [["3", "lo"], ["3", "lo"]]
    assert launcher.wait(timeout=60) == 0


def test_ranks_die_with_a_killed_torchrun(program: Path) -> None:
    launcher = start_torchrun(program, sleep_seconds=60)
    ranks = [psutil.Process(int(report[0])) for report in reports(program.parent, [launcher])]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    for process in alive:
        process.kill()
    assert not alive


def test_srun(program: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        slurm = {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
        }
        environment = clean_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **slurm)
        command = [sys.executable, str(program), str(program.parent), "0"]
        ranks.append(subprocess.Popen(command, env=environment))
    assert [report[1:] for report in reports(program.parent, ranks)] == [["3", "lo"], ["3", "lo"]]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]
