"""A sweep's jobs are commands of their own; one that fails is named and ends no other. The command is a cheap one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.sweep import Job, JobFailed, claim, last_heldout_loss, summary
from megatron_vl.train.run_dir import RunDirectory
from tests.support.runs import CHECKOUT, environment

PLAN = [sys.executable, "-m", "launch.plan"]
STAGE = ["stages=[joint]", "top=1"]
ONE_FAILS = "search.tensor_size=1,0"
REFUSAL = "error: search.tensor_size=0: must be at least 1"


def sweep(
    folder: Path, *words: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*PLAN, "-m", f"hydra.sweep.dir={folder}", *STAGE, *words]
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment() | (variables or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_failed_job_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "search.tensor_size=0,1")
    assert done.returncode == 1
    assert REFUSAL in done.stderr
    assert f"job 0 failed (exit status 1): {tmp_path}/sweep/0" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1 of 2 jobs are done:" in done.stdout
    assert "  job 1: search.tensor_size=1: done:" in done.stdout


def test_submitit_runs_jobs_elsewhere(tmp_path: Path) -> None:
    """In processes of its own, whose screens are files: the summary says which."""
    done = sweep(tmp_path / "sweep", ONE_FAILS, "hydra/launcher=submitit_local")
    assert done.returncode == 1, done.stderr
    failed = next(line for line in done.stdout.splitlines() if "failed (exit status 1)" in line)
    assert failed.startswith("  job 1: search.tensor_size=0")
    assert REFUSAL in Path(failed.split("log ")[1]).read_text()
    assert "  job 0: search.tensor_size=1: done:" in done.stdout


def test_a_search_counts_a_failed_job_as_the_worst(tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    done = sweep(tmp_path / "sweep", *search, "search.tensor_size=0,-1")
    assert "0 of 2 jobs are done:" in done.stdout, done.stderr
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.best_value == float("inf")


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["run.dir=here"], {}, "error: run.dir=here: each job of a sweep has a run directory of its own"),
        (
            [],
            dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0")
            | {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
            "error: this process is one rank of torchrun or srun",
        ),
        ([], {"RANK": "0"}, "error: RANK is set to '0' but LOCAL_RANK, "),
    ],
)
def test_what_no_job_could_do_is_refused_once(
    tmp_path: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    done = sweep(tmp_path / "sweep", ONE_FAILS, *words, variables=variables)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert not (tmp_path / "sweep").exists()


def test_the_objective_is_the_mean_of_each_sources_last_loss(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert last_heldout_loss(run) is None
    rows = [("pages", 9.0), ("text", 4.0), ("pages", 2.0), ("figures", None)]
    run.heldout.write_text("".join(json.dumps({"source": name, "loss": loss}) + "\n" for name, loss in rows))
    assert last_heldout_loss(run) == 3.0


def test_a_job_without_an_end_is_no_job_that_is_done() -> None:
    text = summary([Job(number=3, name="run.seed=1", folder="runs/sweep/3", log="here.err")])
    assert text == "0 of 1 jobs are done:\n  job 3: run.seed=1: running: runs/sweep/3, log here.err"


def test_folders_of_any_name_reach_the_job(tmp_path: Path) -> None:
    """Hydra's grammar knows characters that folders may have."""
    folder = tmp_path / "a b, c"
    done = sweep(tmp_path, "search.tensor_size=1", f"hydra.sweep.subdir='{folder.name}'")
    assert done.returncode == 0, done.stderr
    assert folder.is_dir()
    assert os.listdir(tmp_path / ".jobs")


def test_a_run_directory_belongs_to_one_job(tmp_path: Path) -> None:
    """Its resume is the same job; another one is refused, whoever comes first."""
    claim(tmp_path / "0", "parallel.tensor_size=1")
    claim(tmp_path / "0", "parallel.tensor_size=1")
    with pytest.raises(JobFailed, match=r"the job 'parallel\.tensor_size=1'; give hydra\.sweep\.dir"):
        claim(tmp_path / "0", "parallel.tensor_size=2")
    assert [path.name for path in (tmp_path / "0").iterdir()] == [".job"]
