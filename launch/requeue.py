"""Whether a SLURM job goes on with its run after the ranks have ended: `python -m launch.requeue [overrides]`.

The first word of what it prints is the answer (ANSWERS), the rest is why. The run's status file decides, whatever
signal there was: `done` where nothing is left to do, `stop` where the same start would fail again, else `requeue`.
The answers are kept in restarts.jsonl of the run directory.
"""

import os
import time
from dataclasses import dataclass

from launch.command import run_command
from megatron_vl.checkpoint.state import newest_checkpoint
from megatron_vl.config.root import PretrainConfig
from megatron_vl.train.metrics import JsonLines, read_rows
from megatron_vl.train.run_dir import RunDirectory, RunStatus

ANSWERS = ("done", "requeue", "stop")


@dataclass(frozen=True)
class Restart:
    """One answer, and what it rests on: the job's newest checkpoint tells whether a start has brought anything."""

    answer: str
    why: str
    job: str
    checkpoint: str | None
    time: float  # seconds since the epoch


def requeue(config: PretrainConfig) -> int:
    """Print the answer and keep it. Returns the exit status."""
    run = RunDirectory(config.run.dir)
    newest = newest_checkpoint(run.checkpoints)
    checkpoint = newest.name if newest else None
    job = os.environ.get("SLURM_JOB_ID", "")
    in_vain = _in_vain(read_restarts(run), job, checkpoint)
    answer, why = decide(run.read_status(), in_vain, config.run.max_restarts)
    print(f"{answer}: {why}", flush=True)
    run.path.mkdir(parents=True, exist_ok=True)
    JsonLines(run.restarts).append(Restart(answer, why, job, checkpoint, time.time()))
    return 0


def decide(status: RunStatus | None, in_vain: int, max_restarts: int) -> tuple[str, str]:
    """One of ANSWERS, and why.

    Args:
        status: what the run last said of itself; None: it has not come so far.
        in_vain: how often this job was requeued since there was a new checkpoint.
        max_restarts: how often it may be.
    """
    said = _said(status)
    if status is not None and status.state in ("complete", "stopped"):
        return "done", said
    if status is not None and status.state == "refused":
        return "stop", said
    if in_vain >= max_restarts:
        return "stop", f"{said}; requeued {in_vain} times without a newer checkpoint (run.max_restarts)"
    return "requeue", said


def read_restarts(run: RunDirectory) -> list[Restart]:
    """What was answered so far, in order."""
    if not run.restarts.exists():
        return []
    return [Restart(**row) for row in read_rows(run.restarts)]


def _in_vain(restarts: list[Restart], job: str, checkpoint: str | None) -> int:
    since = 0
    for restart in restarts:
        same = restart.answer == "requeue" and (restart.job, restart.checkpoint) == (job, checkpoint)
        since = since + 1 if same else 0
    return since


def _said(status: RunStatus | None) -> str:
    if status is None:
        return "the ranks ended before they had begun to train"
    where = f"stage {status.stage}, step {status.step}"
    match status.state:
        case "running":
            return f"the ranks ended without a word ({where} was the last start or stage)"
        case "failed" | "refused":
            return f"{where} was where the ranks started: {status.message}"
        case _:
            return f"{status.state} at {where}"


if __name__ == "__main__":
    run_command(requeue)
