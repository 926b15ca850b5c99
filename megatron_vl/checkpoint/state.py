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
    """All checkpoints of a run, judged by the sizes of their files."""
    judged = [(path, damage(path)) for path in _newest_first(folder)]
    return Found(
        good=[path for path, wrong in judged if wrong is None and (path / STATE_FILE).exists()],
        damaged=[(path, wrong) for path, wrong in judged if wrong is not None],
    )


def whole_checkpoints(folder: Path) -> Sequence[Path]:
    """The good checkpoints of a run, the newest first."""
    return find_checkpoints(folder).good


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a run; older ones are not looked at.

    Raises:
        UserError: there are checkpoints, and all are damaged: to start anew would not be what is meant.
    """
    damaged = damaged_before(folder)
    for path in _newest_first(folder):
        wrong = damage(path)
        if wrong is not None:
            damaged.append(f"{path.name}: {wrong}")
        elif (path / STATE_FILE).exists():
            return path
    if not damaged:
        return None
    raise UserError(
        f"{folder} has no good checkpoint to resume from ({'; '.join(damaged)}); restore one, or remove them to start "
        "anew"
    )


def _newest_first(folder: Path) -> list[Path]:
    """Of two of one step the longer name comes first: the second is resharded, and serves more sizes."""
    return sorted(named_checkpoints(folder), key=lambda path: (_claimed_step(path), path.name), reverse=True)


def _claimed_step(path: Path) -> int:
    """The global step that a checkpoint tells, which may be damaged; 0 where it tells none."""
    try:
        return int(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_state(path: Path) -> RunState:
    """The run state of a checkpoint.

    Raises:
        UserError: it was written by another version of the format.
    """
    values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if values["version"] != VERSION:
        raise UserError(f"{path} has checkpoint format {values['version']}; this version reads {VERSION}")
    return RunState(**values)
