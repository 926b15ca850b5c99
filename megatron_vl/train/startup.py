"""How long it takes to a stage's first step, phase by phase."""

import time
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist

# In their order; a stage has those that came before its own first step since the process, or the stage, began.
PHASES = (
    "imports",
    "data indexes",
    "process group",
    "checkpoint search",
    "trackers",
    "groups",
    "model",
    "optimizer",
    "checkpoint load",
    "plan and loader",
    "evaluation",
    "first step",
)


@dataclass
class Startup:
    """Seconds of each phase so far. They leave no gap: a phase lasts from the end of the one before it."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    @classmethod
    def of_process(cls) -> "Startup":
        """From when this process was started, before it had imported anything."""
        age = time.time() - psutil.Process().create_time()
        return cls(_last=time.monotonic() - age)

    def ended(self, phase: str) -> None:
        """Raises ValueError for a phase that is none of PHASES."""
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is no phase of a start")
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def begin_stage(self) -> None:
        """A stage starts: nothing of one before it counts."""
        if PHASES[-1] in self.seconds:
            self.seconds = {}
            self._last = time.monotonic()


def slowest(startup: Startup, device: torch.device) -> dict[str, float]:
    """The seconds of each phase on the rank that took longest for it. Collective over the world."""
    told = torch.tensor([startup.seconds.get(phase, 0.0) for phase in PHASES], dtype=torch.float64)
    told = told.to(device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    longest = dict(zip(PHASES, told.tolist(), strict=True))
    return {phase: longest[phase] for phase in PHASES if phase in startup.seconds}
