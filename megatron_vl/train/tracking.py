"""Weights & Biases beside metrics.jsonl, when asked for."""

import secrets
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

from megatron_vl.train.metrics import finite
from megatron_vl.train.run_dir import RunDirectory, write_atomically


class Tracker(Protocol):
    """Takes rows of numbers by global step."""

    def log(self, row: Mapping[str, Any], global_step: int) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """For tracking.wandb=disabled."""

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        del row, global_step

    def finish(self) -> None: ...


class WandbTracker:
    """One wandb run per run directory: a resume goes on with the id that is kept there."""

    def __init__(self, mode: str, project: str, run: RunDirectory, config: Mapping[str, Any]) -> None:
        import wandb  # seconds to import, and most runs do without it

        if not run.tracking_id.exists():
            write_atomically(run.tracking_id, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            mode=cast(Literal["offline", "online"], mode),
            project=project,
            name=run.path.name,
            id=run.tracking_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run.path,
            config=dict(config),
            settings=wandb.Settings(x_disable_stats=True, console="off", silent=True),  # 0.2 ms a step so
        )

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        self._run.log(finite(dict(row)), step=global_step)

    def finish(self) -> None:
        self._run.finish()


def open_tracker(mode: str, project: str, run: RunDirectory, config: Mapping[str, Any]) -> Tracker:
    """The tracker for `mode`: disabled, offline or online. For the one rank that writes."""
    return NoTracker() if mode == "disabled" else WandbTracker(mode, project, run, config)
