"""Going back to an earlier checkpoint within a run, and giving up data: decided once, kept in faults.jsonl.

A row of kind `rolled_back` takes effect whenever its stage is opened from then on: at once in the same process, and
after a restart, even one that comes before the next checkpoint.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vl.checkpoint.folder import discard
from megatron_vl.checkpoint.state import read_state, whole_checkpoints
from megatron_vl.config.errors import UserError
from megatron_vl.train.health import Health, steps_to_give_up
from megatron_vl.train.metrics import read_rows
from megatron_vl.train.recorder import Recorder
from megatron_vl.train.settings import StageSettings

ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Why, and where to: `to_global_step` is that of the checkpoint, 0 where there was none before `skipped`."""

    stage: str
    skipped: list[int]
    given_up: list[int]
    to_global_step: int


def read_rollbacks(path: Path) -> list[Rollback]:
    """All that a run's faults.jsonl tells of. Collective: rank 0 reads."""
    found: list[list[Rollback]] = [_read(path) if dist.get_rank() == 0 and path.exists() else []]
    dist.broadcast_object_list(found)
    return found[0]


def given_up_in(stage: str, rollbacks: Sequence[Rollback]) -> set[int]:
    """Steps of the stage whose data no rank trains on any more."""
    return {step for one in rollbacks if one.stage == stage for step in one.given_up}


def roll_back(settings: StageSettings, health: Health, max_rollbacks: int, recorder: Recorder) -> None:
    """Make the newest checkpoint before the steps that were skipped the newest of all, and give up data.

    Collective: rank 0 decides.

    Raises:
        UserError: it was gone back to `max_rollbacks` times already.
    """
    error: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        run = recorder.run
        try:
            decided = decide(settings, health, run.checkpoints, _read(run.faults), max_rollbacks)
            recorder.fault({"kind": ROLLED_BACK, **asdict(decided)})
            _drop_later(run.checkpoints, decided.to_global_step)
        except UserError as refusal:
            error = [refusal]
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


def decide(
    settings: StageSettings,
    health: Health,
    checkpoints: Path,
    earlier: Sequence[Rollback],
    max_rollbacks: int,
) -> Rollback:
    """What to do about `health.skipped`. The n-th time at a checkpoint, n - 1 times as many steps before them are
    given up too. Raises UserError as `roll_back` does."""
    stage, skipped, offset = settings.name, health.skipped, settings.first_global_step - 1
    saved = [read_state(path).global_step for path in whole_checkpoints(checkpoints)]
    target = max((step for step in saved if step < offset + skipped[0]), default=0)
    times = sum(one.to_global_step == target for one in earlier)
    if times >= max_rollbacks:
        raise UserError(
            f"stage {stage}, steps {skipped[0]} to {skipped[-1]}: loss or gradients were not finite, or the loss was a "
            f"spike, after going back {times} times to the checkpoint of global step {target} and giving up data "
            f"(train.faults.max_rollbacks={max_rollbacks}); lower stage.{stage}.learning_rate, look at the data of "
            "these steps with launch.preview, or raise train.faults.spike_deviations if such losses are right"
        )
    first = max(target - offset, 0) + 1
    return Rollback(
        stage=stage,
        skipped=list(skipped),
        given_up=steps_to_give_up(skipped, health.given_up, num_before=times * len(skipped), first=first),
        to_global_step=target,
    )


def _read(path: Path) -> list[Rollback]:
    if not path.exists():
        return []
    rows = [row for row in read_rows(path) if row["kind"] == ROLLED_BACK]
    return [Rollback(**{name: row[name] for name in Rollback.__dataclass_fields__}) for row in rows]


def _drop_later(checkpoints: Path, global_step: int) -> None:
    """What was saved of steps that will be trained again must not be resumed."""
    for path in list(whole_checkpoints(checkpoints)):
        if read_state(path).global_step > global_step:
            discard(path)
