"""Where a run stood, and which of its checkpoints are good. No torch: the launcher reads them too."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.folder import damaged_before, named_checkpoints
from megatron_vl.checkpoint.manifest import damage
from megatron_vl.config.errors import UserError

VERSION = 3
STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stood: enough, with the tensors, to continue it bit for bit."""

    stage: str
    step: int  # of the stage
    num_steps: int  # of the stage
    global_step: int
    plan: dict[str, Any]  # the planner's state, all lanes
    fingerprint: dict[str, Any]  # what must not change on resume
    health: dict[str, Any] = field(default_factory=dict)  # of the stage, as train.health writes it
    version: int = VERSION

    @property
    def stage_complete(self) -> bool:
        return self.step >= self.num_steps


@dataclass(frozen=True)
class Found:
    """The checkpoints of a run, the newest first, and what is wrong with those that are damaged."""

    good: Sequence[Path]
    damaged: Sequence[tuple[Path, str]]


def find_checkpoints(folder: Path) -> Found:
    """All checkpoints in a folder, judged by the sizes of their files. Of two of one step (the second is resharded) the
    longer name comes first."""
    good: list[Path] = []
    damaged: list[tuple[Path, str]] = []
    for path in named_checkpoints(folder):
        wrong = damage(path)
        if wrong is not None:
            damaged.append((path, wrong))
        elif (path / STATE_FILE).exists():
            good.append(path)
    good.sort(key=lambda path: (read_state(path).global_step, path.name), reverse=True)
    return Found(good=good, damaged=damaged)


def whole_checkpoints(folder: Path) -> Sequence[Path]:
    """The good checkpoints of a run, the newest first."""
    return find_checkpoints(folder).good


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a run.

    Raises:
        UserError: there are checkpoints, and all are damaged: to start anew would not be what is meant.
    """
    found = find_checkpoints(folder)
    if found.good:
        return found.good[0]
    damaged = [*(f"{path.name}: {wrong}" for path, wrong in found.damaged), *damaged_before(folder)]
    if not damaged:
        return None
    raise UserError(
        f"{folder} has no good checkpoint to resume from ({'; '.join(damaged)}); restore one, or remove them to start "
        "anew"
    )


def read_state(path: Path) -> RunState:
    """The run state of a checkpoint.

    Raises:
        UserError: it was written by another version of the format.
    """
    values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if values["version"] != VERSION:
        raise UserError(f"{path} has checkpoint format {values['version']}; this version reads {VERSION}")
    return RunState(**values)
