"""Sweeps: `python -m launch.pretrain -m field=a,b …`. Every job is a run of its own, and a failed one ends no other.

Hydra's launcher calls a job in this process, or submitit in one of a SLURM job. There the command is started again as a
process with the job's overrides, as if typed by hand, so it may start ranks, be a rank, and end as it likes.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from launch.ranks import FORWARDED
from megatron_vl.config.errors import UserError
from megatron_vl.device.processes import LAUNCHER_VARIABLE, rank_environment
from megatron_vl.train.metrics import read_rows
from megatron_vl.train.run_dir import RunDirectory, write_atomically

ACCOUNTS = ".jobs"  # of each job of a sweep, below the sweep's folder
CLAIM = ".job"  # in a run directory: the overrides of the job that it belongs to
CHANGES = ("train.stop_at=", "tracking")  # what a job may be given another value of, in its run directory
RUNNING, DONE, FAILED = "running", "done", "failed"


class JobFailed(Exception):
    """A job of a sweep ended with another status than 0."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is known of one job of a sweep."""

    number: int
    name: str  # what it has of its own among the overrides
    folder: str  # its run directory
    state: str = RUNNING
    objective: float | None = None  # where its run has measured held-out losses
    message: str = ""
    log: str = ""  # what it prints, where that is not on the screen


def is_job_of_sweep() -> bool:
    """Whether Hydra calls the present task as one of several."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def run_job(module: str, has_run_directory: bool) -> float | None:
    """Run `python -m <module>` with the present job's overrides and, if it has one, a run directory of its own.

    Returns:
        The objective: `last_heldout_loss` of its run directory.

    Raises:
        JobFailed: it ended with another status than 0, or its run directory is that of another job.
    """
    hydra, folder = HydraConfig.get(), _present_folder()
    if has_run_directory:
        claim(folder, " ".join(sorted(word for word in hydra.overrides.task if not word.startswith(CHANGES))))
    own_folder = f"run.dir={QuotedString(text=str(folder), quote=Quote.single).with_quotes()}"
    overrides = [*hydra.overrides.task, *([own_folder] if has_run_directory else []), "hydra.mode=RUN"]
    sources = [source for source in hydra.runtime.config_sources if source.provider == "command-line"]
    folders = [f"--config-dir={source.path}" for source in sources]
    status = _run([sys.executable, "-m", module, *folders, *overrides], _environment())
    if status != 0:
        raise JobFailed(f"exit status {status}")
    return last_heldout_loss(RunDirectory(folder))


def claim(folder: Path, name: str) -> None:
    """Make it the run directory of the job with these overrides, for good. A resume asks less: parallel sizes and
    initial weights may change, so one job would take another's end for its own.

    Raises:
        JobFailed: another job has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, draft = folder / CLAIM, folder / f"{CLAIM}.{socket.gethostname()}.{os.getpid()}"
    draft.write_text(name + "\n", encoding="utf-8")
    try:
        path.hardlink_to(draft)  # whole, or not at all
    except FileExistsError:
        other = path.read_text(encoding="utf-8").rstrip("\n")
        if other != name:
            raise JobFailed(
                f"it has the run directory of the job {other!r}; give hydra.sweep.dir another folder, or "
                "hydra.sweep.subdir everything that varies"
            ) from None
    finally:
        draft.unlink()


def last_heldout_loss(run: RunDirectory) -> float | None:
    """The mean over the held-out sources of each one's last loss; None where none was measured."""
    if not run.heldout.exists():
        return None
    last: dict[str, float | None] = {row["source"]: row["loss"] for row in read_rows(run.heldout)}
    losses = [loss for loss in last.values() if loss is not None]
    return sum(losses) / len(losses) if losses else None


class SweepCallback(Callback):
    """Hydra's hooks around a sweep: a file for each job, wherever it runs, and at the end what became of all.

    Hydra's launchers hand copies of this object to jobs elsewhere.
    """

    def __init__(self) -> None:
        self.accounts = Path()
        self.given: set[str] = set()  # overrides of the sweep; what its jobs vary is not among theirs

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = list(config.hydra.overrides.task)
        self.given = {word.casefold() for word in given}
        own_folder = [word for word in given if word.lstrip("+").startswith("run.dir=")]
        if own_folder:
            _refuse(
                f"{own_folder[0]}: each job of a sweep has a run directory of its own; name the folder of all with "
                "hydra.sweep.dir=DIR"
            )
        _refuse_ranks()
        self.accounts = Path(config.hydra.sweep.dir) / ACCOUNTS / uuid.uuid4().hex

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if is_job_of_sweep() and _is_first_task():
            job = self._present_job()
            print(f"\njob {job.number}: {job.name}: {job.folder}", flush=True)
            self._account(job)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A failure is written down, and told to Hydra, which would end the sweep for it, as the worst of results."""
        if not is_job_of_sweep():
            return
        outcome, job = job_return._return_value, self._present_job()
        if isinstance(outcome, JobFailed):
            job = replace(job, state=FAILED, message=str(outcome))
            print(f"job {job.number} failed ({job.message}): {job.folder}", file=sys.stderr, flush=True)
            job_return.return_value, job_return.status = math.inf, JobStatus.COMPLETED
        elif not isinstance(outcome, Exception):
            job = replace(job, state=DONE, objective=outcome)
        if _is_first_task():
            self._account(job)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        jobs = read_jobs(self.accounts)
        print(f"\n{summary(jobs)}", flush=True)
        if any(job.state != DONE for job in jobs):
            sys.exit(1)

    def _present_job(self) -> Job:
        hydra = HydraConfig.get()
        own = [word for word in hydra.overrides.task if word.casefold() not in self.given]  # true became True
        submitit = _submitit()
        return Job(
            number=int(hydra.job.num),
            name=" ".join(own),
            folder=str(_present_folder()),
            log="" if submitit is None else str(submitit.paths.stderr),
        )

    def _account(self, job: Job) -> None:
        self.accounts.mkdir(parents=True, exist_ok=True)
        write_atomically(self.accounts / f"{job.number}.json", json.dumps(asdict(job)) + "\n")


def read_jobs(accounts: Path) -> list[Job]:
    """The jobs that were begun, in order."""
    jobs = [Job(**json.loads(file.read_text(encoding="utf-8"))) for file in accounts.glob("*.json")]
    return sorted(jobs, key=lambda job: job.number)


def summary(jobs: Sequence[Job]) -> str:
    """A line a job: its state, its objective, what it has of its own, its run directory."""
    num_done = sum(job.state == DONE for job in jobs)
    lines = [f"{num_done} of {len(jobs)} jobs are done:"]
    for job in jobs:
        state = f"{job.state} ({job.message})" if job.message else job.state
        loss = "" if job.objective is None else f", held-out loss {job.objective:.4f}"
        log = f", log {job.log}" if job.log and job.state != DONE else ""
        lines.append(f"  job {job.number}: {job.name}: {state}{loss}: {job.folder}{log}")
    return "\n".join(lines)


def _refuse_ranks() -> None:
    try:
        is_rank = rank_environment() is not None
    except UserError as error:
        _refuse(str(error))
    if is_rank:
        _refuse(
            "this process is one rank of torchrun or srun, but a sweep starts the ranks of its jobs itself: start "
            "it alone; hydra/launcher=slurm makes a SLURM job of each of its jobs"
        )


def _refuse(message: str) -> NoReturn:
    """Hydra makes warnings of what its hooks raise."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _present_folder() -> Path:
    """Below the sweep's, and relative where that is shorter."""
    folder, here = Path(HydraConfig.get().runtime.output_dir), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _is_first_task() -> bool:
    """Of a SLURM job in which every task is a rank; elsewhere there is but one."""
    return _submitit() is None or _submitit().global_rank == 0


def _submitit() -> Any:
    """The environment of submitit's job that this process is; None outside of one."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    import submitit

    return submitit.JobEnvironment()


def _environment() -> dict[str, str]:
    """With one task, submitit's job is a launcher: it must not be taken for a rank of srun. Else it is a rank."""
    environment, job = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid())}, _submitit()
    if job is None:
        return environment
    environment.pop("SLURM_PROCID", None)
    if job.num_tasks == 1:
        return environment
    from submitit.helpers import TorchDistributedEnvironment

    place = TorchDistributedEnvironment()
    return environment | {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
    }


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its exit status.

    Signals are passed on to it; when it has ended they do to this process what they would have done at first, so
    submitit queues a job again after its checkpoint, and a Ctrl-C ends the sweep.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    # A process group of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    before = {int(number): signal.signal(number, pass_on) for number in FORWARDED}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)
    return status
