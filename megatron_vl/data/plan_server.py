"""Plans for all ranks of a node, in a process of its own: `python -m megatron_vl.data.plan_server`.

So a plan is made once a node, and never in the processes that train. It reads what to plan as one line of JSON on its
standard input (see `plan_client.ServerSettings`), and ends when that input does, that is with whoever started it.

    rank ── {"rank": 3, "step": 7, "want": "plan"} ──> server ── the step's plan for that rank ──> rank

Imports no torch: it starts in a moment.
"""

import json
import os
import signal
import socketserver
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from megatron_vl.config.data import MAX_PREFETCH_STEPS
from megatron_vl.config.errors import UserError
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_client import PLAN, STATE, ServerSettings
from megatron_vl.data.plan_settings import rank_group
from megatron_vl.data.plan_state import PlanState
from megatron_vl.data.source_table import open_table
from megatron_vl.data.types import StepPlan

MAX_KEPT_STEPS = 2 * MAX_PREFETCH_STEPS  # a step is asked for again when it is saved, by ranks that are ahead


class PlanBook:
    """The latest steps of every group of ranks that the node has a part in, planned when first asked for."""

    def __init__(self, settings: ServerSettings) -> None:
        """Raises UserError where the sources are not those that the ranks have opened."""
        self._settings = settings
        self._tables = {source.name: open_table(source) for source in settings.sources}
        self._groups: dict[range, _Group] = {}
        self._lock = threading.Lock()

    def look_up(self, rank: int, step: int) -> tuple[StepPlan, PlanState]:
        """A rank's plan of a step, and the state of its lanes after it. Raises UserError, ValueError."""
        plan = self._settings.plan
        with self._lock:
            ranks = rank_group(plan.lanes, plan.balance_lanes, rank, self._settings.dp_size).ranks
            if ranks not in self._groups:
                planner = Planner(self._tables, plan, rank, self._settings.dp_size)
                if self._settings.state is not None:
                    planner.restore(self._settings.state)
                self._groups[ranks] = _Group(planner, OrderedDict())
            return self._groups[ranks].look_up(rank, step)


@dataclass
class _Group:
    planner: Planner
    steps: OrderedDict[int, dict[int, tuple[StepPlan, PlanState]]]

    def look_up(self, rank: int, step: int) -> tuple[StepPlan, PlanState]:
        if step not in self.steps and step <= self.planner.step:
            raise ValueError(f"step {step} was planned long ago; the plan is at {self.planner.step}")
        while step not in self.steps:
            plans = self.planner.next_of_group()
            self.steps[self.planner.step] = {
                rank: (plan, self.planner.state(rank)) for rank, plan in plans.items()
            }
            if len(self.steps) > MAX_KEPT_STEPS:
                self.steps.popitem(last=False)
        return self.steps[step][rank]


class _Handler(socketserver.StreamRequestHandler):
    """One rank's questions, a line each, answered by a line each."""

    server: "_Server"

    def handle(self) -> None:
        for line in self.rfile:
            question = json.loads(line)
            try:
                plan, state = self.server.book.look_up(question["rank"], question["step"])
                answer: dict[str, Any] = {PLAN: _plan_to_json(plan)}
                if question["want"] == STATE:
                    answer = {STATE: state.to_json()}
            except (UserError, ValueError) as error:
                answer = {"error": str(error)}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


def _plan_to_json(plan: StepPlan) -> dict[str, Any]:
    return {**vars(plan), "packs": [pack.units for pack in plan.packs]}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, address: str, book: PlanBook) -> None:
        super().__init__(address, _Handler)
        self.book = book


def main() -> None:
    """Serve until standard input ends."""
    # SLURM sends signals to all processes; they are the ranks' to handle, who save first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    settings = ServerSettings.from_json(json.loads(sys.stdin.readline()))
    try:
        server = _Server(settings.address, PlanBook(settings))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    threading.Thread(target=_exit_with_input, daemon=True).start()
    server.serve_forever()


def _exit_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
