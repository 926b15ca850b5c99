"""Hydra's sweeps as SLURM jobs: one that trains on two nodes, requeued before its time limit, and one that fails."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import CHECKOUT, command, metrics, wait_for
from tests.support.slurm import HELD, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

LAUNCHER = (
    "hydra/launcher=slurm",
    "hydra.launcher.nodes=2",
    "hydra.launcher.timeout_min=20",
    "hydra.sweep.dir=sweep",
)
STEPS = 40


def test_a_sweep(slurm: Slurm, data_root: Path) -> None:
    short = ["stages=[adaptor]", f"train.steps={STEPS}", "heldout.max_samples=0", "tracking.progress=false"]
    overrides = [word for word in command(data_root, Path(), *short)[3:] if not word.startswith("run.dir=")]
    words = [sys.executable, "-m", "launch.pretrain", "-m", *LAUNCHER, "parallel.tensor_size=1,3", *overrides]
    variables = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        words,
        cwd=slurm.work,
        env=slurm.environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        trained = slurm.work / "sweep" / "0"
        wait_for(lambda: process.poll() is not None or len(metrics(trained)) > 1, "two steps", seconds=600)
        assert process.poll() is None and len(metrics(trained)) < STEPS
        (job,) = {path.name.split("_")[0] for path in (slurm.work / "sweep" / ".submitit").glob("*_0")}
        assert slurm.run("scancel", "--signal=USR2", f"{job}_0")[0] == 0
        slurm.wait_for_state(f"{job}_0", HELD)
        time.sleep(3)  # its credentials are taken back by the second, and a start within that one with them
        slurm.start_again_now(f"{job}_0")
        status, before = json.loads((trained / "status.json").read_text()), metrics(trained)
        assert (status["state"], status["step"]) == ("interrupted", len(before))
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, output
    assert "1 of 2 jobs are done:" in output
    assert "job 1: parallel.tensor_size=3: failed (exit status 1): sweep/1, log " in output
    assert [row["global_step"] for row in metrics(trained)] == list(range(1, STEPS + 1))
    assert metrics(trained)[: len(before)] == before, "it began anew"
