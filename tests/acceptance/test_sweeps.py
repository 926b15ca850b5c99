"""A sweep trains one run after the other, each in a directory of its own, and stops as one run does."""

import json
import signal
from pathlib import Path

import pytest

from launch.compare import main
from tests.support.runs import command, finish, losses, metrics, start, wait_for


def sweep(data_root: Path, folder: Path, *overrides: str) -> list[str]:
    """An ablation of the paper, a run's first two steps; jobs have the run directories `folder`/<number>."""
    words = command(data_root, Path(), *overrides)
    here = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir='${hydra.job.num}'", "data.warmup_fraction=0"]
    ablation = [*words[:3], "experiment=ablation/modality_grouping", *here]
    return ablation + [word for word in words[3:] if not word.startswith("run.dir=")]


@pytest.mark.slow
def test_an_ablation(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = finish(sweep(data_root, tmp_path, "train.steps=2"))
    assert status == 0, output
    assert "2 of 2 jobs are done:" in output
    modalities = [[row["modality"] for row in metrics(tmp_path / str(job))] for job in range(2)]
    assert "mixed" not in modalities[0] and "mixed" in modalities[1]
    assert main([str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    told = capsys.readouterr().out
    assert "grouping" in told and "phase" in told and "mixed" in told

    status, output = finish(sweep(data_root, tmp_path, "train.steps=2"))
    assert status == 0 and output.count("is complete") == 2, "the same command resumes a sweep"


def test_a_signal_ends_the_job_with_a_checkpoint_and_the_sweep(data_root: Path, tmp_path: Path) -> None:
    process = start(sweep(data_root, tmp_path, "train.steps=5000", "heldout.max_samples=0"))
    try:
        wait_for(lambda: len(metrics(tmp_path / "0")) > 1, "the first job's second step")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM
    assert json.loads((tmp_path / "0" / "status.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
def test_submitits_tasks_are_ranks(data_root: Path, tmp_path: Path) -> None:
    """As under SLURM: two tasks make a job of two ranks, whose losses are those of a run of two local ranks."""
    submitit = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    short = ["train.steps=2", "heldout.max_samples=0", "hydra.sweeper.params=null"]
    status, output = finish(sweep(data_root, tmp_path, *short, *submitit))
    assert status == 0, output
    local = command(data_root, tmp_path / "local", "experiment=ablation/modality_grouping", "hydra.mode=RUN")
    shared = ["train.steps=2", "heldout.max_samples=0", "data.warmup_fraction=0", "run.num_processes=2"]
    status, output = finish([*local, *shared])
    assert status == 0, output
    assert losses(tmp_path / "0") == losses(tmp_path / "local")
