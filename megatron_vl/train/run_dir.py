"""A run's directory: where its files lie, the lock of its one writer, and its status for scripts to read."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vl.config.errors import PassingError, UserError

RUN_STATES = ("running", "interrupted", "stopped", "complete", "failed", "refused")
MAX_MESSAGE = 2000  # characters of an exception that the status keeps
LOCK_VARIABLE = "MEGATRON_VL_RUN_LOCK"  # set by the local launcher: the file descriptor of the lock it holds


@dataclass(frozen=True)
class RunStatus:
    """What a run last said of itself: `stopped` is by train.stop_at, `interrupted` by a signal; `failed` is by an
    exception, `refused` by a UserError, which the same start would meet again.

    `step` counts from 1 within the stage; `message` says why the run failed. Raises ValueError for a state that is not
    in RUN_STATES.
    """

    state: str
    stage: str
    step: int
    message: str = ""

    def __post_init__(self) -> None:
        if self.state not in RUN_STATES:
            raise ValueError(f"run state {self.state!r} is none of {', '.join(RUN_STATES)}")


class RunDirectory:
    """The layout of one run and the right to write there.

    The lock is flock(2) on `.lock`. It belongs to the open file, so ranks that inherit the descriptor hold it
    with their launcher, and it falls when the last of them is gone: no second writer beside a dying rank.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.heldout = self.path / "heldout.jsonl"
        self.image_use = self.path / "image_use.jsonl"
        self.benchmarks = self.path / "benchmarks.jsonl"
        self.timeline = self.path / "timeline.jsonl"
        self.checkpoint_costs = self.path / "checkpoints.jsonl"
        self.faults = self.path / "faults.jsonl"
        self.samples = self.path / "samples.json"
        self.report = self.path / "report.html"
        self.config = self.path / "config_resolved.yaml"
        self.status = self.path / "status.json"
        self.restarts = self.path / "restarts.jsonl"
        self.startup = self.path / "startup.jsonl"
        self.tracking_id = self.path / "wandb_run_id"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.lock = self.path / ".lock"
        self._descriptor: int | None = None

    def acquire(self, wait_seconds: float = 10.0) -> None:
        """Become the run's one writer, waiting up to `wait_seconds` for another one that is ending.

        A rank started by the local launcher takes part in the lock that the launcher already holds.
        Raises UserError: the wait was in vain (names the holder), or files cannot be written or locked.
        """
        if self._descriptor is not None:
            return
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            inherited = self._inherited_descriptor()
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644) if inherited is None else inherited
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be written ({error.strerror}: {error.filename}); "
                "name a directory that you own"
            ) from error
        self._lock(descriptor, wait_seconds)
        if inherited is None:  # else the launcher has signed
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up; does nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def lock_descriptor(self) -> int:
        """The open file to pass on to ranks. Raises RuntimeError before `acquire`."""
        if self._descriptor is None:
            raise RuntimeError(f"the lock of {self.path} is not held; call acquire() first")
        return self._descriptor

    def write_status(self, status: RunStatus) -> None:
        write_atomically(self.status, json.dumps(asdict(status)) + "\n")

    def read_status(self) -> RunStatus | None:
        """The last status written; None for a run that has not started training."""
        if not self.status.exists():
            return None
        return RunStatus(**json.loads(self.status.read_text(encoding="utf-8")))

    @contextmanager
    def failures_told(self, rank: int) -> Iterator[None]:
        """Any rank's exception goes into the status, unless a peer's has: the first one does, and before any other a
        UserError that will not pass by itself. What has ended well stays so."""
        try:
            yield
        except Exception as error:
            last = self.read_status()
            lasts = isinstance(error, UserError) and not isinstance(error, PassingError)
            state = "refused" if lasts else "failed"
            if last is not None and last.state in ("running", "failed") and last.state != state:
                text = str(error) if state == "refused" else f"rank {rank}: {type(error).__name__}: {error}"
                self.write_status(replace(last, state=state, message=text[:MAX_MESSAGE]))
            raise

    def write_config(self, config: Mapping[str, Any], commit: str, environment: Mapping[str, str]) -> None:
        """Write the resolved configuration with the code's commit and the versions of its libraries."""
        document = {"commit": commit, "environment": dict(environment), **config}
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(document)))

    def _inherited_descriptor(self) -> int | None:
        value = os.environ.get(LOCK_VARIABLE)
        if value is None or not self.lock.exists():
            return None
        try:
            same = os.path.samestat(os.fstat(int(value)), self.lock.stat())
        except OSError:  # closed in this process: the variable came down from a launcher further up
            return None
        return int(value) if same else None

    def _lock(self, descriptor: int, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise UserError(self._refusal()) from None
                time.sleep(0.1)
            except OSError as error:
                os.close(descriptor)
                raise UserError(
                    f"run.dir={self.path}: its file system refuses file locks ({error.strerror}); "
                    "choose a directory on one that has them (Lustre: mount with -o flock)"
                ) from error

    def _refusal(self) -> str:
        try:
            holder = json.loads(self.lock.read_text(encoding="utf-8"))
            since = datetime.fromtimestamp(holder["started"]).strftime("%Y-%m-%d %H:%M:%S")
            who = f"process {holder['pid']} on {holder['host']}, since {since}"
        except (ValueError, KeyError):  # it has just taken the lock and not signed yet
            who = "another process that has just started"
        return (
            f"run.dir={self.path} is in use by {who}; let that run end or stop it, or choose another run.dir"
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old text or the new one."""
    writer = f"{socket.gethostname()}.{os.getpid()}"  # ranks of several hosts write
    temporary = path.with_name(f".{path.name}.{writer}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
