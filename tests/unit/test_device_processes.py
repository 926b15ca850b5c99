"""What a launcher tells a process, and dying with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.device.processes import RankEnvironment, rank_environment

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "20017",
}


def test_torchrun_and_srun_are_understood() -> None:
    assert rank_environment(TORCHRUN) == RankEnvironment(3, 1, 4, "127.0.0.1", 29500)
    assert rank_environment(SRUN) == RankEnvironment(5, 1, 8, "node1", 20017)
    assert rank_environment(SRUN | TORCHRUN) == rank_environment(TORCHRUN), "torchrun inside of srun"


def test_without_a_launcher_there_is_no_rank() -> None:
    batch_script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert rank_environment({"PATH": "/bin"}) is None
    assert rank_environment(batch_script) is None
    shell = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    assert rank_environment(shell) is None, "srun --pty bash"


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("missing", ["local", "size", "MASTER_ADDR", "MASTER_PORT"])
def test_partial_variables_are_an_error(environ: dict[str, str], missing: str) -> None:
    slurm = "SLURM_PROCID" in environ
    name = {
        "local": "SLURM_LOCALID" if slurm else "LOCAL_RANK",
        "size": "SLURM_NTASKS" if slurm else "WORLD_SIZE",
    }.get(missing, missing)
    with pytest.raises(UserError, match=f"{name} is not"):
        rank_environment({key: value for key, value in environ.items() if key != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1 is not below"),
    ],
)
def test_wrong_numbers_are_an_error(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_environment(TORCHRUN | change)


# The parent tells its child's process id; the child outlives it, unless it dies with it.
FAMILY = """
import os, time
from megatron_vl.device.processes import die_with_parent
child = os.fork()
if child == 0:
    {child}
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def start_family(child: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY.format(child=child)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert parent.stdout is not None
    return parent, psutil.Process(int(parent.stdout.readline()))


def wait_for_end(process: psutil.Process) -> bool:
    try:
        process.wait(timeout=5)
    except psutil.TimeoutExpired:
        process.kill()
        return False
    return True


def test_a_child_dies_with_its_killed_parent() -> None:
    parent, child = start_family("die_with_parent(os.getppid())")
    try:
        time.sleep(0.3)
        assert child.is_running()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for_end(child)


def test_a_parent_that_was_gone_already_is_noticed() -> None:
    parent, child = start_family("die_with_parent(2**22 + 1)")
    try:
        deadline = time.monotonic() + 5
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.02)
        assert child.status() == psutil.STATUS_ZOMBIE
    finally:
        parent.kill()
        parent.wait()
