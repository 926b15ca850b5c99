"""Start this machine's ranks, pass signals on to them, and say once what went wrong.

Standard output of rank 0 is the run's; everything else that ranks print goes to `logs/rank-<n>.log` in the
run directory. Ranks end with this launcher, even by SIGKILL, since each asks the kernel for it
(`megatron_vl.device.processes.die_with_parent`).
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_vl.device.processes import LAUNCHER_VARIABLE, STORE_VARIABLE
from megatron_vl.train.run_dir import LOCK_VARIABLE, RunDirectory

HOST = "127.0.0.1"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.02
GRACE_SECONDS = 5.0  # for the other ranks to report the loss of a peer, and again to obey SIGTERM
MESSAGE_LINES = 40
USER_ERROR = "error: "  # how a rank begins the one line of a UserError
TRACEBACK = "Traceback (most recent call last):"  # torch puts "[rank0]: " before it


@dataclass(eq=False)
class _Rank:
    """One rank's process, where its log began for this start, and when and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    status: int | None = None
    ended_at: float = 0.0  # seconds since the epoch

    def poll(self) -> bool:
        """Whether the process has ended."""
        if self.status is None:
            self.status = self.process.poll()
            self.ended_at = time.time()
        return self.status is not None

    def message(self) -> str:
        """Its user error, else its last traceback, else its last lines."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", errors="replace").rstrip().splitlines()
        user_errors = [line for line in lines if line.startswith(USER_ERROR)]
        if user_errors:
            return user_errors[-1]
        tracebacks = [number for number, line in enumerate(lines) if TRACEBACK in line]
        return "\n".join(lines[tracebacks[-1] if tracebacks else 0 :][-MESSAGE_LINES:])

    @property
    def failed_at(self) -> float:
        """When it broke. A killed process writes nothing; one that raised does, well before it has ended."""
        killed = self.status is not None and self.status < 0
        return self.ended_at if killed else self.log.stat().st_mtime


@dataclass
class _Signals:
    """Passes signals on to the ranks; a second Ctrl-C means now."""

    ranks: list[_Rank] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in self.received
        self.received.append(number)
        _signal_all(self.ranks, signal.SIGKILL if again else number)


def start_local_ranks(
    num_processes: int,
    argv: Sequence[str],
    run: RunDirectory,
    threads_per_process: int | None = None,
    module: str = "launch.pretrain",
) -> int:
    """Run `python -m <module> <argv>` as ranks 0 to num_processes - 1; return the launcher's exit status.

    `run` must have been acquired; the ranks inherit its lock. `threads_per_process` (None: an equal share of
    the cores, unless OMP_NUM_THREADS says otherwise) goes to OpenMP. Returns 0 when all ranks end with 0 and
    the run was not interrupted, 128 + the signal's number after a signal, else the status of the rank that
    broke first; what that rank said is then the last thing on standard error.
    """
    signals = _Signals()
    with ExitStack() as stack:
        # Bound before any rank is told of it, so nobody else gets the port; rank 0 serves the store there. This
        # process never imports torch.
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        for number in FORWARDED:
            stack.callback(signal.signal, number, signal.signal(number, signals.handle))
        try:
            for rank in range(num_processes):
                environment = _environment(rank, num_processes, listener, threads_per_process)
                environment[LOCK_VARIABLE] = str(run.lock_descriptor)
                command = [sys.executable, "-m", module, *argv]
                shared = [run.lock_descriptor, *([listener.fileno()] if rank == 0 else [])]
                signals.ranks.append(_start(rank, command, environment, run.logs, shared))
            listener.close()
            _wait(signals.ranks)
        finally:
            _signal_all(signals.ranks, signal.SIGKILL)
    return _conclude(signals, run)


def _environment(rank: int, world_size: int, store: socket.socket, threads: int | None) -> dict[str, str]:
    share = max(1, len(os.sched_getaffinity(0)) // world_size)
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(store.getsockname()[1]),
        STORE_VARIABLE: str(store.fileno()),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    if threads is not None:
        ours["OMP_NUM_THREADS"] = str(threads)
    return {"OMP_NUM_THREADS": str(share), **os.environ, **ours}


def _start(
    rank: int, command: list[str], environment: dict[str, str], logs: Path, shared: list[int]
) -> _Rank:
    """Its own process group: a Ctrl-C in the terminal reaches the launcher alone, which passes it on once."""
    log = logs / f"rank-{rank}.log"
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else file,
            stderr=file,
            pass_fds=shared,
            process_group=0,
        )
    return _Rank(rank, process, log, start)


def _wait(ranks: list[_Rank]) -> None:
    """Until all have ended. Once one has failed the others get a grace period, then SIGTERM, then SIGKILL."""
    remaining = list(ranks)
    escalation = [signal.SIGTERM, signal.SIGKILL]
    deadline: float | None = None
    while remaining := [rank for rank in remaining if not rank.poll()]:
        now = time.monotonic()
        if deadline is None and any(rank.status not in (None, 0) for rank in ranks):
            deadline = now + GRACE_SECONDS
        if deadline is not None and now >= deadline and escalation:
            _signal_all(remaining, escalation.pop(0))
            deadline = now + GRACE_SECONDS
        time.sleep(POLL_SECONDS)


def _signal_all(ranks: list[_Rank], number: int) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _conclude(signals: _Signals, run: RunDirectory) -> int:
    failed = [rank for rank in signals.ranks if rank.status != 0]
    status = run.read_status()
    interrupted = status is not None and status.state == "interrupted"
    stop_signals = [number for number in signals.received if number in (signal.SIGINT, signal.SIGTERM)]
    if stop_signals and (failed or interrupted):
        return 128 + stop_signals[-1]
    if not failed:
        return 128 + signals.received[-1] if interrupted and signals.received else int(interrupted)
    sys.stdout.flush()
    messages = {rank: rank.message() for rank in failed}
    user_errors = [rank for rank in failed if messages[rank].startswith(USER_ERROR)]
    cause = min(user_errors or failed, key=lambda rank: rank.failed_at)
    if not user_errors:
        print(_headline(cause), file=sys.stderr)
    print(messages[cause], file=sys.stderr, flush=True)
    return cause.status if cause.status and cause.status > 0 else 1


def _headline(rank: _Rank) -> str:
    status = rank.status or 0
    how = (
        f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
    )
    hint = " (out of memory? see the kernel's log)" if status == -signal.SIGKILL else ""
    return f"\nrank {rank.number} {how}{hint}; all it said is in {rank.log}"
