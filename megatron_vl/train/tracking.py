"""Trackers beside metrics.jsonl, when asked for: Weights & Biases and TensorBoard. None of them can stop a run."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Protocol, cast

from megatron_vl.config.train import TrackingConfig
from megatron_vl.train.metrics import finite
from megatron_vl.train.run_dir import RunDirectory, write_atomically

INIT_SECONDS, FINISH_SECONDS = 30, 60  # that wandb may take for the network, at the start and at the end

Say = Callable[[str], None]


class Tracker(Protocol):
    """Takes rows by global step: numbers, texts, or mappings of them. May raise what it likes."""

    def log(self, row: Mapping[str, Any], global_step: int) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """All trackers of a run. One that fails is named once and left out from then on; training goes on."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]], say: Say) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name, opener in openers.items():
            self._attempt(name, partial(self._add, name, opener))

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.log, row, global_step))

    def finish(self) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.finish)
        self._open.clear()

    def _add(self, name: str, opener: Callable[[], Tracker]) -> None:
        self._open[name] = opener()

    def _attempt(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: metrics.jsonl has everything
            self._open.pop(name, None)
            reason = (str(error).splitlines() or [""])[0]
            self._say(f"{name} failed, and is left out from here on: {type(error).__name__}: {reason}")


class WandbTracker:
    """One wandb run per run directory: a resume goes on with the id that is kept there.

    Rows of steps that a resumed run trains again are dropped by wandb, which takes steps in order; they have the
    values that it has already.
    """

    def __init__(self, mode: str, project: str, run: RunDirectory, config: Mapping[str, Any]) -> None:
        import wandb  # seconds to import, and most runs do without it

        if not run.tracking_id.exists():
            write_atomically(run.tracking_id, secrets.token_hex(4) + "\n")

        self._run = wandb.init(
            mode=cast(Literal["offline", "online"], mode),
            project=project,
            name=run.path.resolve().name,
            id=run.tracking_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run.path,
            config=dict(config),
            settings=wandb.Settings(
                x_disable_stats=True,  # 0.2 ms a step without it and the console
                console="off",
                silent=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        self._run.log(finite(dict(flat(row))), step=global_step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """Scalars in the run directory's `tensorboard`. Those of `first_step` and later, of a run that had been further,
    are hidden once it goes on."""

    def __init__(self, run: RunDirectory, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=first_step)

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        for name, value in flat(finite(dict(row))):
            if isinstance(value, int | float) and name != "global_step":
                self._writer.add_scalar(name, value, global_step)

    def finish(self) -> None:
        self._writer.close()


def flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The row's values by name; those of a mapping within it by name/key."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in flat(value))
        else:
            yield name, value


def open_trackers(
    tracking: TrackingConfig, run: RunDirectory, config: Mapping[str, Any], first_step: int, say: Say
) -> Trackers:
    """Those that `tracking` asks for. For the one rank that writes; `first_step` is the next one to come."""
    openers: dict[str, Callable[[], Tracker]] = {}
    if tracking.wandb != "disabled":
        openers["wandb"] = lambda: WandbTracker(tracking.wandb, tracking.project, run, config)
    if tracking.tensorboard:
        openers["TensorBoard"] = lambda: TensorBoardTracker(run, first_step)
    return Trackers(openers, say)
