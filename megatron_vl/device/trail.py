"""What this process is doing right now, for whoever asks why it stands still or where it ran out of memory.

One a process, like its stack: layers far apart leave their marks here, and whoever looks must not have to ask them.
Leaving one costs a fraction of a microsecond.
"""

from dataclasses import dataclass


@dataclass
class Trail:
    """The last mark that this process has left. `waits`: for other ranks, rather than being at work of its own.

    `starting`: the first step of the stage is not done, for which ranks have more time.
    """

    stage: str = ""
    step: int = 0
    starting: bool = True
    phase: str = "start"
    number: int = 0  # of the pass of this phase within the step, from 1; 0 where there is but one
    waits: bool = False
    moves: int = 0  # marks left so far

    def at(self, phase: str, number: int = 0, waits: bool = False) -> None:
        """Leave a mark."""
        self.phase, self.number, self.waits = phase, number, waits
        self.moves += 1

    def begin_stage(self, stage: str) -> None:
        """Marks from here on belong to the start of this stage."""
        self.stage, self.step, self.starting = stage, 0, True
        self.at("start")

    def begin_step(self, step: int) -> None:
        """Marks from here on belong to this step."""
        self.step = step

    def __str__(self) -> str:
        what = f"{self.phase} {self.number}" if self.number else self.phase
        return f"stage {self.stage}, step {self.step}, {what}" if self.stage else what


TRAIL = Trail()
