"""One checkpoint on its way: every rank writes its files, then rank 0 makes a checkpoint of them."""

import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_vl.checkpoint.folder import publish
from megatron_vl.checkpoint.manifest import seal, sync_folder
from megatron_vl.checkpoint.writing import Background, Job, Written, write
from megatron_vl.config.errors import PassingError
from megatron_vl.device.trail import TRAIL

T = TypeVar("T")


@dataclass(kw_only=True)
class Costs:
    """Bytes of all files of tensors; of the rank with most: bytes held only for saving, and seconds of writing."""

    num_bytes: int = 0
    host_bytes: int = 0
    write_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What rank 0 does: `companions` writes what belongs beside the tensors into the folder; `clear` follows when the
    checkpoint is whole, and only tells where it fails."""

    companions: Callable[[Path], None]
    clear: Callable[[], None]


@dataclass(kw_only=True)
class Saving:
    """Begins with its making. All ranks then call `go_on` together, twice, best when none of them is busy."""

    path: Path
    job: Job
    finish: Finish
    host_bytes: int
    low_priority: bool
    costs: Costs = field(default_factory=Costs)
    notice: str = ""  # what has gone wrong with older checkpoints

    def __post_init__(self) -> None:
        self._writing = Background(lambda: write(self.job), self.low_priority)
        self._publishing: Background[None] | None = None
        self._num_moves = 0

    def is_busy(self) -> bool:
        """Whether this rank would wait in `go_on`."""
        return (self._publishing or self._writing).is_busy()

    def leave_mark(self) -> None:
        """For whoever watches this rank, if it has done anything since the last time."""
        if self.job.num_moves != self._num_moves:
            self._num_moves = self.job.num_moves
            TRAIL.at("checkpoint", self._num_moves)

    def go_on(self) -> bool:
        """Whether the checkpoint is whole on disk. Collective over the world.

        Raises:
            PassingError: the disk is full or failing for some rank; said on all, and nothing is left of the checkpoint.
        """
        try:
            if self._publishing is not None:
                self._outcome(self._publishing)
                return True
            written = self._outcome(self._writing)
        except Exception:  # whatever it was: half a checkpoint must not stay
            if dist.get_rank() == 0:
                shutil.rmtree(self.job.folder, ignore_errors=True)
            raise
        self.job.let_go()
        by_rank: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((written, self.host_bytes), by_rank)
        self._publishing = Background(lambda: self._publish(by_rank or []), self.low_priority)
        return False

    def _publish(self, by_rank: list[tuple[Written, int]]) -> None:
        """On rank 0; nothing elsewhere."""
        if self.job.metadata is None:
            return
        files = {name: record for written, _ in by_rank for name, record in written.files.items()}
        self.costs = Costs(
            num_bytes=sum(record.num_bytes for record in files.values()),
            host_bytes=max(host_bytes for _, host_bytes in by_rank),
            write_seconds=max(written.seconds for written, _ in by_rank),
        )
        self.job.storage.finish(self.job.metadata, [written.results for written, _ in by_rank])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.job.folder))
        self.finish.companions(self.job.folder)
        seal(self.job.folder, files)
        self.job.moved()
        sync_folder(self.job.folder, but=files)
        publish(self.job.folder, self.path)
        self.job.moved()
        try:
            self.finish.clear()
        except OSError as error:
            self.notice = f"{self.path.name} is saved, but older checkpoints cannot be deleted: {error}"

    def _outcome(self, work: Background[T]) -> T:
        """What the work has given here, once no rank's has failed."""
        mine: tuple[bool, str] | None = None
        try:
            result = work.result()
        except OSError as error:
            mine = (True, str(error))
        except Exception:  # told to all ranks, which raise it together
            mine = (False, traceback.format_exc())
        by_rank: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)
        for failure in by_rank:
            if failure is not None:
                is_of_disk, text = failure
                raise PassingError(refusal(self.path, text)) if is_of_disk else RuntimeError(text)
        return result


def refusal(path: Path, reason: str) -> str:
    """Why a run that cannot save ends, and what to do."""
    free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
    return (
        f"checkpoint {path} cannot be written: {reason}; its disk has {free / 1e9:.2f} GB free. Earlier checkpoints "
        "are as they were. Make room, or lower checkpoint.keep, and start the run again: it goes on from the newest"
    )
