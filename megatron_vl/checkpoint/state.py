"""Where a run stood, and which of its checkpoints is the newest. No torch: the launcher reads it too."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.config.errors import UserError

VERSION = 2
STATE_FILE = "state.json"
ASIDE = ".tmp"  # suffix of a checkpoint that is being written


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stood: enough, with the tensors, to continue it bit for bit."""

    stage: str
    step: int  # of the stage
    num_steps: int  # of the stage
    global_step: int
    plan: dict[str, Any]  # the planner's state, all lanes
    fingerprint: dict[str, Any]  # what must not change on resume
    health: dict[str, Any] = field(default_factory=dict)  # losses of late, steps skipped and given up
    version: int = VERSION

    @property
    def stage_complete(self) -> bool:
        return self.step >= self.num_steps


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, by global step."""
    return max(whole_checkpoints(folder), key=lambda path: read_state(path).global_step, default=None)


def whole_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run that were written to their end."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.suffix != ASIDE and (path / STATE_FILE).exists()]


def read_state(path: Path) -> RunState:
    """The run state of a checkpoint.

    Raises:
        UserError: it was written by another version of the format.
    """
    values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if values["version"] != VERSION:
        raise UserError(f"{path} has checkpoint format {values['version']}; this version reads {VERSION}")
    return RunState(**values)
