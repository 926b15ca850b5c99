"""A run killed by SIGKILL at some moment and started again ends like the uninterrupted one, bit for bit."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from megatron_vl.checkpoint.state import whole_checkpoints
from tests.support.runs import command, finish, losses, metrics, start, wait_for

SETTINGS = {
    "tp2": ["parallel.tensor_size=2"],
    "pp2": ["parallel.pipeline_size=2"],
    "dp2": ["run.num_processes=2"],
}
# Four steps of each of two stages, a checkpoint every second step: who is killed, and after how many steps.
KILLS = {"tp2": ("launcher", 3), "pp2": ("rank 1", 5), "dp2": ("rank 0", 6)}
STEPS = [
    "stages=[adaptor,joint]",
    "train.steps=4",
    "checkpoint.every=2",
    "data.text_ratio=0.5",
    "heldout.max_samples=0",
]


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    children = psutil.Process(launcher).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[] if name == "dp2" else pytest.mark.slow) for name in SETTINGS]
)
def test_same_losses_to_the_last_bit(setting: str, data_root: Path, tmp_path: Path) -> None:
    overrides = [*STEPS, *SETTINGS[setting]]
    status, output = finish(command(data_root, tmp_path / "whole", *overrides))
    assert status == 0, output

    victim, rows = KILLS[setting]
    arguments = command(data_root, tmp_path / "killed", *overrides)
    process = start(arguments)
    checkpoints = tmp_path / "killed" / "checkpoints"
    wait_for(
        lambda: (
            (len(metrics(tmp_path / "killed")) >= rows and len(whole_checkpoints(checkpoints)) > 0)
            or process.poll() is not None
        ),
        f"{rows} steps and a checkpoint",
    )
    ranks = ranks_of(process.pid)
    target = process.pid if victim == "launcher" else ranks[int(victim[-1])].pid
    os.kill(target, signal.SIGKILL)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=20)
    assert not alive, "ranks outlived their run"
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert len(metrics(tmp_path / "killed")) < 8, "the kill came too late to show anything"

    status, output = finish(arguments)
    assert status == 0, output
    assert "resuming" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [row["global_step"] for row in metrics(tmp_path / "killed")] == list(range(1, 9))


@pytest.mark.slow
def test_the_finished_run_is_left_alone(data_root: Path, tmp_path: Path) -> None:
    """The same command on a finished run says so; a stop in between changes nothing; other values are refused."""
    overrides = ["stages=[adaptor]", "train.steps=4", "heldout.max_samples=0"]
    assert finish(command(data_root, tmp_path / "whole", *overrides))[0] == 0

    arguments = command(data_root, tmp_path / "stopped", *overrides)
    status, output = finish([*arguments, "train.stop_at=2"])
    assert status == 0, output
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "stopped"
    assert len(metrics(tmp_path / "stopped")) == 2
    assert finish([*arguments, "run.num_processes=2"])[0] == 0  # the data-parallel size may change
    learned = [row["loss"] for row in metrics(tmp_path / "stopped")]
    assert learned == pytest.approx([row["loss"] for row in metrics(tmp_path / "whole")], abs=1e-5)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*") if path.is_file()}
    status, output = finish(arguments)
    assert status == 0
    assert "is complete" in output
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {tmp_path / "stopped" / ".lock"}


def test_a_signal_ends_the_step_and_saves(data_root: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher: a checkpoint after the present step, and the run goes on from there exactly."""
    overrides = ["stages=[adaptor]", "train.steps=12", "heldout.max_samples=0"]
    assert finish(command(data_root, tmp_path / "whole", *overrides))[0] == 0

    arguments = command(data_root, tmp_path / "asked", *overrides)
    process = start(arguments)
    wait_for(lambda: len(metrics(tmp_path / "asked")) >= 2 or process.poll() is not None, "two steps")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    state = json.loads((tmp_path / "asked" / "status.json").read_text())
    assert state["state"] == "interrupted"
    assert state["step"] == len(metrics(tmp_path / "asked")) < 12

    status, output = finish(arguments)
    assert status == 0, output
    assert f"resuming after step {state['step']}" in output
    assert losses(tmp_path / "asked") == losses(tmp_path / "whole")
