"""What the scripts of slurm/ ask SLURM for, with programs in its place that write down how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import CHECKOUT

PROGRAM = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
    *launch.check*) exit "${CHECK_STATUS:-0}" ;;
    *launch.node_check*) echo "NCCL version 2.27.5+cuda12.9" && [ -z "${BAD_NODES:-}" ] || echo "not fit: $BAD_NODES" ;;
    *launch.requeue*) echo "${ANSWER:-done: complete}" ;;
    "scontrol show hostnames"*) printf '%s\\n' n1 n2 ;;
    "scontrol show job"*) printf '   %s\n' "Req=(null) ExcNodeList=${EXCLUDED:-(null)}" "Command=$COMMAND --a b" ;;
    sbatch*) env | grep ^SLURM_ || true ;;
    squeue*) echo "${STATE-RUNNING None}" ;;
    sleep*) exit 0 ;;
esac
"""
IN_A_JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NAME": "pretrain_1b",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts, and programs that only write down their calls, python and apptainer among them."""
    shutil.copytree(CHECKOUT / "slurm", tmp_path / "slurm")
    (tmp_path / "bin").mkdir()
    for name in ("python", "apptainer", "srun", "sbatch", "scontrol", "squeue", "scancel", "sleep"):
        (tmp_path / "bin" / name).write_text(PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)
    write_cluster(tmp_path, "container=none")
    return tmp_path


def write_cluster(checkout: Path, lines: str) -> None:
    file = checkout / "slurm" / "env" / "test.sh"
    file.write_text(f"python={checkout}/bin/python\nsrun_options=(--cpu-bind=cores)\n{lines}\n")


def run(checkout: Path, *words: str, **variables: str) -> tuple[int, list[str], str]:
    """The script's exit status, the calls that it made, and what it printed. In a job it is the copy that sbatch
    makes."""
    calls, script = checkout / "calls", checkout / "slurm" / words[0]
    calls.write_text("")
    copy = checkout / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(script, copy)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    ours = {"PATH": f"{checkout}/bin:{kept['PATH']}", "CALLS": str(calls), "MEGATRON_VL_CLUSTER": "test"}
    ours["COMMAND"] = str(script)
    done = subprocess.run(
        [str(copy if "SLURM_JOB_NAME" in variables else script), *words[1:]],
        cwd=checkout,
        env={**kept, **ours, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines(), done.stdout


def test_the_check_knows_the_number_of_ranks_and_comes_first(checkout: Path) -> None:
    status, calls, _ = run(checkout, "pretrain_7b.sh", "--nodes=32", "--time=8:00:00", "run.seed=1")
    assert status == 0
    assert calls == [
        "python -m launch.check experiment=paper_7b run.seed=1 run.num_processes=256",
        f"sbatch --export=ALL --nodes=32 --time=8:00:00 {checkout}/slurm/pretrain_7b.sh run.seed=1",
    ]
    status, calls, _ = run(checkout, "pretrain_7b.sh", CHECK_STATUS="1")
    assert status == 1
    assert calls == ["python -m launch.check experiment=paper_7b run.num_processes=512"]


def test_a_sweep_is_checked_line_by_line(checkout: Path) -> None:
    (checkout / "sizes.txt").write_text("run.seed=1 a=b\nrun.seed=2\n")
    status, calls, _ = run(checkout, "pretrain_1b.sh", "c=d", SWEEP="sizes.txt")
    assert status == 0
    lines = ["run.dir=runs/sizes/0 run.seed=1 a=b", "run.dir=runs/sizes/1 run.seed=2"]
    words = "experiment=paper_1b c=d"
    assert calls[:2] == [f"python -m launch.check {words} {line} run.num_processes=128" for line in lines]
    assert calls[2] == f"sbatch --export=ALL --array=0-1 {checkout}/slurm/pretrain_1b.sh c=d"
    assert (checkout / "runs/sizes/sizes.txt").read_text() == (checkout / "sizes.txt").read_text()
    status, calls, _ = run(checkout, "pretrain_1b.sh", "c=d", SWEEP="runs/sizes/sizes.txt")
    assert status == 0 and calls[2].startswith("sbatch")
    (checkout / "sizes.txt").write_text("run.seed=3\n")
    status, calls, output = run(checkout, "pretrain_1b.sh", "c=d", SWEEP="sizes.txt")
    assert status == 1 and not any(call.startswith("sbatch") for call in calls)
    assert "SWEEP=sizes.txt has other lines than runs/sizes/sizes.txt" in output


@pytest.mark.parametrize(
    ("container", "asked"),
    [
        ("none", "{bin}/python -m"),
        (
            "pyxis",
            "--container-image=image.sqsh --container-mounts=/data:/data --container-workdir={here} {bin}/python -m",
        ),
        ("apptainer", "apptainer exec --nv --bind /data:/data --pwd {here} image.sqsh {bin}/python -m"),
    ],
)
def test_ranks_start_in_the_container(container: str, asked: str, checkout: Path) -> None:
    write_cluster(checkout, f"container={container} image=image.sqsh mounts=/data:/data")
    status, calls, _ = run(checkout, "pretrain_1b.sh", **IN_A_JOB)
    assert status == 0
    (step,) = [call for call in calls if call.startswith("srun") and "launch.pretrain" in call]
    assert "--cpu-bind=cores" in step
    assert "--output=logs/pretrain_1b-12345/pretrain_1b-12345-%N-%t.log" in step
    assert step.endswith(
        f"{asked.format(bin=checkout / 'bin', here=checkout)} launch.pretrain experiment=paper_1b"
    )


def test_a_check_in_pyxis_is_a_step_of_one_task(checkout: Path) -> None:
    """On a login node it asks for what the job would, as srun does not read sbatch's variables."""
    write_cluster(checkout, "container=pyxis image=image.sqsh")
    _, calls, _ = run(checkout, "pretrain_1b.sh", "--account=mine", SBATCH_PARTITION="gpu")
    assert calls[0].startswith("srun --nodes=1 --ntasks=1 --account=mine --partition=gpu --container-image")
    _, calls, _ = run(checkout, "pretrain_1b.sh", **IN_A_JOB)
    (check,) = [call for call in calls if call.startswith("srun") and "launch.check" in call]
    assert check.startswith("srun --nodes=1 --ntasks=1 --overlap --gres=none --container-image")


def test_an_interactive_allocation_is_no_job(checkout: Path) -> None:
    around = {"SLURM_JOB_ID": "12345", "SLURM_ARRAY_JOB_ID": "12340", "SLURM_CONF": "/etc/slurm.conf"}
    status, calls, output = run(checkout, "pretrain_1b.sh", **around)
    assert status == 0
    assert [call.split()[0] for call in calls] == ["python", "sbatch"]
    assert output.split() == ["SLURM_CONF=/etc/slurm.conf"]  # of the allocation the job is told nothing


def scontrol(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith(("scontrol requeue", "scontrol update"))]


@pytest.mark.parametrize(
    ("variables", "asked", "status"),
    [
        ({"ANSWER": "requeue: interrupted"}, ["scontrol requeue 12345"], 0),
        ({"ANSWER": "requeue: interrupted", "STATE": "COMPLETING None"}, [], 0),
        ({"ANSWER": "requeue: interrupted", "STATE": "COMPLETING TimeLimit"}, ["scontrol requeue 12345"], 0),
        ({"ANSWER": "requeue: interrupted", "STATE": ""}, ["scontrol requeue 12345"], 0),
        ({"ANSWER": "stop: an error"}, [], 1),
        ({"ANSWER": "stop: requeued 3 times", "BAD_NODES": "n7"}, [], 1),
        ({"ANSWER": "done: complete"}, [], 0),
        (
            {"ANSWER": "requeue: x", "SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "3"},
            ["scontrol requeue 12345_3"],
            0,
        ),
        (
            {"BAD_NODES": "n7", "EXCLUDED": "n1,n2", "ANSWER": "requeue: not fit"},
            ["scontrol requeue 12345", "scontrol update jobid=12345 ExcNodeList=n1,n2,n7"],
            0,
        ),
        ({"CHECK_STATUS": "1", "ANSWER": "requeue: x"}, [], 1),
        (
            {"CHECK_STATUS": "1", "ANSWER": "requeue: x", "SLURM_RESTART_COUNT": "1"},
            ["scontrol requeue 12345"],
            0,
        ),
    ],
)
def test_when_a_job_comes_back(
    variables: dict[str, str], asked: list[str], status: int, checkout: Path
) -> None:
    found, calls, output = run(checkout, "pretrain_1b.sh", **IN_A_JOB, **variables)
    assert found == status, output
    assert scontrol(calls) == asked


def test_evaluation_is_checked_and_submitted(checkout: Path) -> None:
    status, calls, _ = run(checkout, "evaluate.sh", "checkpoint=a")
    assert status == 0
    assert calls == [
        "python -m launch.evaluate checkpoint=a mode=check run.num_processes=8",
        f"sbatch --export=ALL {checkout}/slurm/evaluate.sh checkpoint=a",
    ]


def test_a_plan_needs_no_ranks(checkout: Path) -> None:
    status, calls, _ = run(checkout, "plan.sh", "experiment=paper_7b", **IN_A_JOB)
    assert status == 0
    modules = ["launch.plan experiment=paper_7b", "launch.plan experiment=paper_7b verify=true"]
    assert calls[1:] == [f"python -m {words}" for words in [*modules, "launch.check experiment=paper_7b"]]


@pytest.mark.parametrize(
    ("lines", "told"),
    [("container=docker", "container=docker in"), ("python=/nowhere", "/nowhere is missing")],
)
def test_environment_files_that_cannot_be(lines: str, told: str, checkout: Path) -> None:
    write_cluster(checkout, lines)
    status, calls, output = run(checkout, "pretrain_1b.sh")
    assert (status, calls) == (1, [])
    assert told in output
