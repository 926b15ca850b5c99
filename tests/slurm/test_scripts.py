"""The scripts of slurm/ on a real SLURM of two nodes, with the tiny model on CPUs."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.checkpoint.state import newest_checkpoint
from tests.support.fault_matrix import BIT_FOR_BIT, Row, seen
from tests.support.faults import last_step
from tests.support.runs import CHECKOUT, command, losses, metrics, wait_for
from tests.support.slurm import ENDS, HELD, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # on a machine that does other work too

PRETRAIN = str(CHECKOUT / "slurm" / "pretrain_1b.sh")
# Two ranks; as many nodes as the cluster has, without GPUs.
SHAPE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=20")
STEPS = ("stages=[adaptor]", "train.steps=12", "checkpoint.every=4", "node_check.enabled=false")


def overrides(data_root: Path, run_dir: str, *others: str) -> list[str]:
    """The tiny model instead of the paper's, on small data."""
    words = command(
        data_root, Path(run_dir), "experiment=quickstart", "heldout.max_samples=0", *STEPS, *others
    )
    return words[3:]


def status(slurm: Slurm, run_dir: str = "run") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((slurm.work / run_dir / "status.json").read_text())
    return values


def answers(slurm: Slurm) -> list[str]:
    lines = (slurm.work / "run" / "restarts.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def has_steps(slurm: Slurm, job: str, number: int) -> None:
    """Wait until so many steps are in the metrics."""
    slurm.wait_for_state(job, "RUNNING")
    wait_for(
        lambda: len(metrics(slurm.work / "run")) >= number or slurm.state(job).startswith((*ENDS, HELD)),
        f"{number} steps of job {job}",
        seconds=600,
    )
    assert slurm.state(job).startswith("RUNNING"), slurm.log(job)
    assert len(metrics(slurm.work / "run")) < 12, "too late to show anything"


@pytest.fixture(scope="module")
def whole(nodes: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    """A run from start to end, submitted by the script itself."""
    slurm = Slurm(nodes, tmp_path_factory.mktemp("whole"))
    job = slurm.submit(PRETRAIN, *SHAPE, *overrides(data_root, "run"))
    slurm.wait_for_state(job, "COMPLETED")
    return slurm


def test_a_finished_run(whole: Slurm) -> None:
    assert status(whole)["state"] == "complete"
    assert [row["global_step"] for row in metrics(whole.work / "run")] == list(range(1, 13))
    assert answers(whole) == ["done"]
    (batch,) = whole.work.glob("pretrain_1b-*.log")
    names = {path.name for path in (whole.work / "logs" / batch.stem).iterdir()}
    assert names == {f"{batch.stem}-n1-0.log", f"{batch.stem}-n2-1.log"}


def test_requeued_before_the_time_limit(slurm: Slurm, whole: Slurm, data_root: Path) -> None:
    """The signal is the one of --signal=B:USR1@600, which reaches the batch script alone."""
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run"))
    has_steps(slurm, job, 2)
    assert slurm.run("scancel", "--batch", "--signal=USR1", job)[0] == 0
    slurm.start_again_now(job)
    assert status(slurm)["state"] == "interrupted"
    slurm.wait_for_state(job, "COMPLETED")
    assert "resuming" in slurm.log(job)
    assert answers(slurm) == ["requeue", "done"]
    assert losses(slurm.work / "run") == losses(whole.work / "run")


def test_slurm_sends_the_signal_by_itself(slurm: Slurm, data_root: Path) -> None:
    """Of a run that would take longer, whose time limit is suddenly nine minutes off."""
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run", "train.steps=5000"))
    wait_for(lambda: last_step(slurm.work / "run") >= 2, "two steps", 600)
    assert slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=9")[0] == 0
    slurm.wait_for_state(job, HELD)
    assert (status(slurm)["state"], answers(slurm)) == ("interrupted", ["requeue"])
    assert status(slurm)["step"] == last_step(slurm.work / "run")
    assert slurm.run("scancel", job)[0] == 0


@pytest.mark.slow
def test_requeued_at_the_time_limit_itself(slurm: Slurm, data_root: Path) -> None:
    """No signal to save has come before; the script has as long as SLURM leaves it."""
    limit = ("--time=1", "--signal=B:CONT@1")
    job = slurm.submit("sbatch", *SHAPE, *limit, PRETRAIN, *overrides(data_root, "run", "train.steps=50000"))
    slurm.wait_for_state(job, HELD)
    assert "DUE TO TIME LIMIT" in slurm.log(job)
    assert last_step(slurm.work / "run") > 0
    assert slurm.run("scancel", job)[0] == 0


def test_preempted(slurm: Slurm, whole: Slurm, data_root: Path) -> None:
    """SLURM asks the ranks alone to end, and takes the exit status 0 for success; the run comes back all the same."""
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run"))
    has_steps(slurm, job, 2)
    urgent = slurm.submit("sbatch", "--partition=urgent", "--nodes=2", "--wrap=true", "--exclusive")
    slurm.start_again_now(job)
    assert status(slurm)["state"] == "interrupted"
    slurm.wait_for_state(urgent, "COMPLETED")
    slurm.wait_for_state(job, "COMPLETED")
    assert losses(slurm.work / "run") == losses(whole.work / "run")


@pytest.mark.parametrize("node", ["n1", pytest.param("n2", marks=pytest.mark.slow)])
def test_a_node_dies(node: str, slurm: Slurm, whole: Slurm, data_root: Path) -> None:
    """n1 runs the batch script and rank 0, n2 only a rank. The run goes on with the spare node."""
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run"))
    has_steps(slurm, job, 4)
    wait_for(lambda: newest_checkpoint(slurm.work / "run" / "checkpoints") is not None, "a checkpoint", 600)
    assert slurm.state(job).startswith("RUNNING"), slurm.log(job)
    with slurm.spare_node():
        slurm.node("kill", node)
        trained, killed = last_step(slurm.work / "run"), time.monotonic()
        slurm.wait_for_state(job, HELD)
        seconds = time.monotonic() - killed
        slurm.start_again_now(job)
        slurm.wait_for_state(job, "COMPLETED")
    slurm.node("node", node)
    resumed = re.search("resuming after step (4|8)", slurm.log(job))
    assert resumed is not None
    assert losses(slurm.work / "run") == losses(whole.work / "run")
    lost = trained - int(resumed[1])
    seen(Row(fault="a node is lost", detected_seconds=seconds, steps_lost=lost, result=BIT_FOR_BIT))


def test_cancelled_jobs_stay_away(slurm: Slurm, data_root: Path) -> None:
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run"))
    has_steps(slurm, job, 2)
    assert slurm.run("scancel", job)[0] == 0
    slurm.wait_for_state(job, "CANCELLED")
    slurm.wait_for_idle("n1", "n2")
    assert slurm.state(job).startswith("CANCELLED")


def test_a_bad_node_is_excluded(slurm: Slurm, data_root: Path) -> None:
    """n2 finds no space where the run writes, n1 does."""
    (slurm.work / "run").mkdir()
    inside = ("nsenter", f"--target={(slurm.folder / 'n2.pid').read_text().strip()}", "--mount")
    full = (*inside, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(slurm.work / "run"))
    assert slurm.run(*full)[0] == 0
    small = ("matmul_size=128", "message_mib=1", "write_mib=1", "min_free_gib=0.1", "min_matmul_share=0")
    check = ["node_check.enabled=true", *(f"node_check.{value}" for value in small)]
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run", *check))
    slurm.wait_for_state(job, "PENDING Beg")
    wait_for(lambda: "ExcNodeList=n2" in slurm.facts(job), "n2 to be excluded")
    assert "No space left on device" in slurm.log(job)
    assert not metrics(slurm.work / "run")
    assert slurm.run(*inside, "umount", str(slurm.work / "run"))[0] == 0


def test_a_sweep_in_an_array(slurm: Slurm, data_root: Path) -> None:
    """Each line of the file is a run with a folder and a length of its own."""
    (slurm.work / "lengths.txt").write_text("train.steps=2\ntrain.steps=3 run.seed=1\n")
    words = [word for word in overrides(data_root, "unused") if not word.startswith("run.dir=")]
    job = slurm.submit(PRETRAIN, "--nodes=1", *SHAPE[1:], *words, SWEEP="lengths.txt")
    for task, length in (("0", 2), ("1", 3)):
        slurm.wait_for_state(f"{job}_{task}", "COMPLETED")
        assert len(metrics(slurm.work / "runs" / "lengths" / task)) == length


def test_refusals_come_before_a_job(slurm: Slurm, data_root: Path) -> None:
    """An impossible request, missing weights, missing data: each is told at once, and nothing is in the queue."""
    given = overrides(data_root, "run")
    for words, told in (
        (("sbatch", "--nodes=4", *SHAPE[1:], PRETRAIN, *given), "error: "),
        ((PRETRAIN, *SHAPE), "checkpoint.initial=DIR"),
        ((PRETRAIN, *SHAPE, "checkpoint.random=true"), "give data.root=DIR"),
        ((PRETRAIN, "-N2", *given), "--name=value"),
        ((PRETRAIN, *SHAPE, *given, "parallel.tensor_size=3"), "parallel.tensor_size"),
    ):
        exit_status, output = slurm.run(*words)
        assert exit_status == 1, output
        assert told in output
    assert not slurm.run("squeue", "--noheader")[1].strip()


def test_under_sbatch_the_check_is_the_first_thing(slurm: Slurm) -> None:
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN)
    slurm.wait_for_state(job, "FAILED")
    assert "checkpoint.initial=DIR" in slurm.log(job)
    assert not list(slurm.work.glob("logs/*/*.log")), "ranks were started"


def test_an_error_of_the_user_is_not_repeated(slurm: Slurm, data_root: Path) -> None:
    """One that only training finds: a learning rate that no step survives."""
    hopeless = (
        "stage.adaptor.learning_rate=1e30",
        "train.faults.skipped_in_a_row=1",
        "train.faults.max_rollbacks=0",
    )
    job = slurm.submit("sbatch", *SHAPE, PRETRAIN, *overrides(data_root, "run", *hopeless))
    slurm.wait_for_state(job, "FAILED")
    assert status(slurm)["state"] == "refused"
    assert answers(slurm) == ["stop"]
