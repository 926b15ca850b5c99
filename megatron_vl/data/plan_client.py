"""A rank's way to the plan that one process makes for all ranks of its node (`plan_server.py`)."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_vl.config.errors import PassingError, UserError
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.plan_state import PlanState
from megatron_vl.data.source_table import PlannedSource
from megatron_vl.data.types import Pack, StepPlan, Unit

PLAN, STATE = "plan", "state"  # what can be asked for
START_SECONDS = 60.0  # that a server may take to open its sources


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a node's server plans. `state` is where to go on, with all lanes; None begins the stage.

    `address` is of a socket in Linux's abstract namespace: it belongs to the host and leaves no file.
    """

    address: str
    dp_size: int
    plan: PlanSettings
    sources: tuple[PlannedSource, ...]
    state: PlanState | None

    def to_json(self) -> dict[str, Any]:
        state = None if self.state is None else self.state.to_json()
        return {**asdict(self), "state": state}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "ServerSettings":
        """The inverse of `to_json`."""
        plan = {**saved["plan"], "cost": RowCost(**saved["plan"]["cost"])}
        return cls(
            address=saved["address"],
            dp_size=saved["dp_size"],
            plan=PlanSettings(**plan),
            sources=tuple(PlannedSource.from_json(source) for source in saved["sources"]),
            state=None if saved["state"] is None else PlanState.from_json(saved["state"]),
        )


@contextmanager
def plan_server(settings: ServerSettings) -> Iterator[None]:
    """Run a server; it also ends when this process does, however that may be."""
    command = [sys.executable, "-m", "megatron_vl.data.plan_server"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stdin is not None
    try:
        try:
            process.stdin.write(json.dumps(settings.to_json(), default=str) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and said why; whoever connects will miss it
        yield
    finally:
        process.kill()  # the end of its input alone may be late: processes forked from this one hold the pipe too
        process.wait()
        process.stdin.close()


class PlanClient:
    """Asks the node's server for one step after the other. Safe to share between threads. Use as a context manager.

    Raises PassingError where no server answers within START_SECONDS.
    """

    def __init__(self, address: str, rank: int, first_step: int) -> None:
        """`rank`: the data-parallel one."""
        self._rank, self._next, self._lock = rank, first_step, threading.Lock()
        self._socket = _connect(address)
        self._stream = self._socket.makefile("rwb")

    def next(self) -> StepPlan:
        """The next step's plan. Raises UserError where the server cannot make one, PassingError where it has ended."""
        answer = self._ask(self._next, PLAN)[PLAN]
        self._next += 1
        packs = tuple(Pack(tuple(Unit(*unit) for unit in pack)) for pack in answer.pop("packs"))
        return StepPlan(packs=packs, **answer)

    def state_after(self, step: int) -> PlanState:
        """Where the lanes of this rank stand after a step of late. Raises as `next` does."""
        return PlanState.from_json(self._ask(step, STATE)[STATE])

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, step: int, want: str) -> dict[str, Any]:
        with self._lock:
            try:
                self._stream.write(
                    json.dumps({"rank": self._rank, "step": step, "want": want}).encode() + b"\n"
                )
                self._stream.flush()
                line = self._stream.readline()
            except OSError:
                line = b""
        if not line:
            raise PassingError(
                "the process that plans for this node has ended; what it said stands in the logs"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


def _connect(address: str) -> socket.socket:
    deadline = time.monotonic() + START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise PassingError(
                    f"no process plans for this node ({error.strerror}); it is started by the node's local rank 0, "
                    "and what it said stands in that rank's log"
                ) from error
            time.sleep(0.05)
