"""Saving a run's checkpoints, in the background if wanted, so that one of them is whole at every moment.

A checkpoint is a folder `<stage>-<step>`: the sharded tensors (weights, optimizer, random states), `model.json` and the
tokenizer (what the weights are), `optimizer.json` (how the optimizer is stored), `state.json` (where the run stood) and
`manifest.json` (every file's size and digest). docs/checkpoints.md says what is guaranteed.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_vl.checkpoint.buckets import OptimizerLayout, has_bare_bucket, layout_here
from megatron_vl.checkpoint.description import Description, write_description
from megatron_vl.checkpoint.folder import aside_of, clear_leftovers
from megatron_vl.checkpoint.retention import drop_superseded
from megatron_vl.checkpoint.saving import Finish, Saving, refusal
from megatron_vl.checkpoint.sharded import num_trained, sharded_state
from megatron_vl.checkpoint.sharding import FULLY_RESHARDABLE, STATE_BYTES, choose_sharding
from megatron_vl.checkpoint.state import STATE_FILE, RunState
from megatron_vl.checkpoint.writing import Planner, bytes_of
from megatron_vl.config.errors import PassingError
from megatron_vl.config.train import CheckpointConfig
from megatron_vl.parallel.groups import Groups

POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one checkpoint has cost: a row of checkpoints.jsonl."""

    stage: str
    step: int
    global_step: int
    name: str
    optimizer_sharding: str
    asynchronous: bool
    num_bytes: int  # of all files of tensors
    host_bytes: int  # held on the host only for saving, by the rank with most
    stall_seconds: float  # that training has waited
    write_seconds: float  # until the slowest rank had its files on disk
    notice: str = ""  # what has gone wrong with older checkpoints


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What stays as it is while one optimizer trains."""

    optimizer: MegatronOptimizer
    layout: OptimizerLayout
    planner: Planner
    gathered_bytes: int  # on the rank with most
    device: torch.device


@dataclass(kw_only=True)
class _Pending:
    """A checkpoint on its way, the state that it is of, and how long training has waited for it."""

    saving: Saving
    state: RunState
    stage: _Stage
    stall_seconds: float


class CheckpointStore:
    """The checkpoints of one run directory. Its methods are collective over the world.

    Each gets the `description` of the weights and the tokenizer files beside `tokenizer`. `on_saved` is called on every
    rank when one is whole on disk; its numbers are right on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        values: CheckpointConfig,
        description: Description,
        tokenizer: Path,
        on_saved: Callable[[Saved], None],
    ) -> None:
        self.folder, self.values = folder, values
        self.description, self.tokenizer = description, tokenizer
        self._on_saved = on_saved
        self._stage: _Stage | None = None
        self._pending: _Pending | None = None

    def save(self, state: RunState, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups) -> None:
        """Begin a checkpoint, once the one before is whole; if not asynchronous, finish it too.

        Raises:
            PassingError: the disk has no room, or writing has failed, for this one or the one before; on all ranks.
        """
        self._finish()
        began = time.perf_counter()
        stage = self._settle(chunks, optimizer, groups)
        tensors = sharded_state(chunks, optimizer, groups, stage.layout.sharding)
        path = self.folder / f"{state.stage}-{state.step:08d}"
        self._make_room(path, bytes_of(tensors))
        job = stage.planner.plan(aside_of(path), tensors, copy=self.values.asynchronous)
        saving = Saving(
            path=path,
            job=job,
            finish=Finish(
                companions=partial(self._write_companions, state, stage.layout),
                clear=partial(drop_superseded, self.folder, self.values.keep, self.values.keep_every),
            ),
            host_bytes=job.host_bytes + stage.gathered_bytes,
            low_priority=self.values.asynchronous,
        )
        self._pending = _Pending(
            saving=saving, state=state, stage=stage, stall_seconds=time.perf_counter() - began
        )
        if not self.values.asynchronous:
            self._finish()

    def is_busy(self) -> bool:
        """Whether this rank still writes its part of a checkpoint. Not collective."""
        return self._pending is not None and self._pending.saving.is_busy()

    def advance(self, *, busy: bool) -> None:
        """After every step: goes on with a checkpoint unless some rank was `busy`, as all have told each other in that
        step's agreement, so that none waits for another's files.

        Raises PassingError as `save` does.
        """
        if self._pending is not None and not busy:
            self._go_on(self._pending)

    def close_stage(self) -> None:
        """Wait until what was saved is whole on disk, and let go of the stage's optimizer. Raises as `save` does."""
        self._finish()
        self._stage = None

    def _finish(self) -> None:
        """Ranks ask each other rather than wait in one collective, whose time a slow disk may exceed."""
        while (pending := self._pending) is not None:
            began = time.perf_counter()
            while self.is_some_rank_busy():
                time.sleep(POLL_SECONDS)
                pending.saving.leave_mark()
            pending.stall_seconds += time.perf_counter() - began
            self._go_on(pending)

    def is_some_rank_busy(self) -> bool:
        """The same on all ranks, which meet here."""
        if self._pending is None:
            return False
        busy = torch.tensor(float(self.is_busy()), device=self._pending.stage.device)
        dist.all_reduce(busy)
        return bool(busy.item())

    def _go_on(self, pending: _Pending) -> None:
        began = time.perf_counter()
        self._pending = None  # for good, if it fails
        is_whole = pending.saving.go_on()
        pending.stall_seconds += time.perf_counter() - began
        if is_whole:
            self._on_saved(self._told(pending))
        else:
            self._pending = pending

    def _told(self, pending: _Pending) -> Saved:
        state, saving = pending.state, pending.saving
        return Saved(
            stage=state.stage,
            step=state.step,
            global_step=state.global_step,
            name=saving.path.name,
            optimizer_sharding=pending.stage.layout.sharding,
            asynchronous=self.values.asynchronous,
            num_bytes=saving.costs.num_bytes,
            host_bytes=saving.costs.host_bytes,
            stall_seconds=pending.stall_seconds,
            write_seconds=saving.costs.write_seconds,
            notice=saving.notice,
        )

    def _settle(self, chunks: list[Any], optimizer: MegatronOptimizer, groups: Groups) -> _Stage:
        """What a stage's first checkpoint decides for all of them."""
        if self._stage is not None and self._stage.optimizer is optimizer:
            return self._stage
        by_rank: list[tuple[int, bool]] = [(0, False)] * dist.get_world_size()
        dist.all_gather_object(by_rank, (num_trained(chunks), has_bare_bucket(optimizer)))
        most = max(number for number, _ in by_rank)
        bare = [rank for rank, (_, is_bare) in enumerate(by_rank) if is_bare]
        sharding = choose_sharding(self.values.optimizer_sharding, most, bare)
        self._stage = _Stage(
            optimizer=optimizer,
            layout=layout_here(sharding, chunks, optimizer, groups),
            planner=Planner(groups),
            gathered_bytes=most * STATE_BYTES if sharding == FULLY_RESHARDABLE else 0,
            device=groups.device,
        )
        return self._stage

    def _make_room(self, path: Path, num_bytes: int) -> None:
        """An empty folder to write `path` in, on a disk with room for what all ranks will write (`num_bytes` here)."""
        by_rank = [0] * dist.get_world_size()
        dist.all_gather_object(by_rank, num_bytes)
        told = [""]
        if dist.get_rank() == 0:
            told = [_prepare(path, sum(by_rank))]
        dist.broadcast_object_list(told)
        if told[0]:
            raise PassingError(told[0])

    def _write_companions(self, state: RunState, layout: OptimizerLayout, aside: Path) -> None:
        write_description(aside, self.description, self.tokenizer.parent)
        layout.write(aside)
        (aside / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")


def _prepare(path: Path, num_bytes: int) -> str:
    """Why `path` cannot be written; nothing, if it can."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        if num_bytes > shutil.disk_usage(path.parent).free:
            return refusal(path, f"it needs {num_bytes / 1e9:.2f} GB")
        aside_of(path).mkdir()
    except OSError as error:
        return refusal(path, str(error))
    return ""
