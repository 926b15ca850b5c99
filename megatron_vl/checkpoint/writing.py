"""One rank's part of writing a checkpoint: megatron-core plans it, here it is copied and written.

megatron-core would fork a process to write from. It would hold the rank's locks and connections, outlive a rank that is
killed, and take a page fault for everything that the next step changes. Here a thread writes from a copy: what takes
time (checksums, digests, the file system) runs without Python's lock.
"""

import io
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vl.checkpoint.manifest import DigestedFile, FileRecord
from megatron_vl.checkpoint.sharded import tensors
from megatron_vl.checkpoint.streaming import COMMON_FILE
from megatron_vl.parallel.groups import Groups

FORMAT = SerializationFormat.TORCH_SAVE
NICENESS = 10  # of the thread that writes: training goes first


T = TypeVar("T")


@dataclass(kw_only=True)
class Job:
    """What this rank has to write. `metadata`, on rank 0, says where everything will lie."""

    folder: Path
    buckets: list[WriteBucket]
    common: bytes  # the file of what is not sharded; of rank 0
    storage: FileSystemWriterAsync
    metadata: Metadata | None
    host_bytes: int  # that are held only for writing
    from_gpu: bool
    num_moves: int = 0  # pieces brought to disk, and other things done so far

    def moved(self) -> None:
        """Something has been done."""
        self.num_moves += 1

    def let_go(self) -> None:
        """Give back what was held for writing. torch would keep pinned memory, in powers of two, for the next time; one
        that is older than this function does."""
        self.buckets.clear()
        if self.from_gpu and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()


@dataclass(frozen=True)
class Written:
    """What a rank has written, by path within the checkpoint, and how long that took."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    seconds: float = 0.0


class Background(Generic[T]):
    """Work in a thread that ends with the process. One of low priority lets everything else of the process go first."""

    def __init__(self, work: Callable[[], T], low_priority: bool) -> None:
        self._work, self._low_priority = work, low_priority
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> T:
        """Wait for it. Raises what the work has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(T, self._result)  # None only where T is

    def _run(self) -> None:
        try:
            if self._low_priority:  # on Linux that of the thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            self._result = self._work()
        except BaseException as error:  # raised where the result is asked for
            self._error = error


class Planner:
    """Plans the checkpoints of one stage: which rank writes what is found once. Collective over the world."""

    def __init__(self, groups: Groups) -> None:
        self._device = groups.device
        self._strategy = _PlanOnly("torch_dist", 1, thread_count=1)
        self._spread = FullyParallelSaveStrategyWrapper(
            self._strategy, groups.collection.dp, do_cache_distribution=True
        )
        self._is_checked = False

    def plan(self, folder: Path, state: dict[str, Any], copy: bool) -> Job:
        """What this rank writes into `folder`. With `copy`, of values that no later step changes."""
        live = {value.data.untyped_storage().data_ptr() for value in tensors(state)}
        sharded, common = save_preprocess(state, validate_access_integrity=not self._is_checked)
        self._is_checked = True
        self._spread.async_save(sharded, folder)
        storage, metadata = self._strategy.planned
        buckets, host_bytes = _on_host(storage.write_buckets or [], live, copy)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        file = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save(common, file)
        return Job(
            folder=folder,
            buckets=buckets,
            common=file.getvalue(),
            storage=storage,
            metadata=metadata,
            host_bytes=host_bytes,
            from_gpu=self._device.type == "cuda",
        )


class _PlanOnly(TorchDistSaveShardedStrategy):
    """megatron-core's own strategy up to where it would write."""

    planned: tuple[FileSystemWriterAsync, Metadata | None]

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.planned = writer, planned[1]
        return AsyncRequest(None, (), [])


def bytes_of(state: dict[str, Any]) -> int:
    """What of a sharded state this rank stands for in the checkpoint."""
    return sum(value.data.nbytes for value in tensors(state) if is_main_replica(value.replica_id))


def _on_host(buckets: list[WriteBucket], live: set[int], copy: bool) -> tuple[list[WriteBucket], int]:
    """The buckets with tensors on the host, with `copy` none of them in memory that is in `live`; and the bytes that
    are not. megatron-core has already copied what is part of a larger stretch of the host's memory."""
    held = 0

    def on_host(tensor: Tensor) -> Tensor:
        nonlocal held
        if not tensor.is_cpu:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        elif tensor.untyped_storage().data_ptr() in live:
            if not copy:
                return tensor
            tensor = tensor.clone()
        held += tensor.nbytes
        return tensor

    copied = [
        (path, name, (objects, [(item, on_host(tensor)) for item, tensor in values]))
        for path, name, (objects, values) in buckets
    ]
    return copied, held


def write(job: Job) -> Written:
    """Write this rank's files and bring them to disk. Raises OSError."""
    began = time.perf_counter()
    results: list[WriteResult] = []
    files: dict[str, FileRecord] = {}
    for path, name, (objects, values) in job.buckets:
        with DigestedFile(Path(path), job.moved) as file:
            stream = cast(io.IOBase, file)  # as far as torch uses one
            for item, data in objects + values:
                results.append(_write_item(job.storage.transforms, stream, data, item, name, FORMAT))
                job.moved()
            files[name] = file.close()
    if job.common:
        with DigestedFile(job.folder / COMMON_FILE, job.moved) as file:
            file.write(job.common)
            files[COMMON_FILE] = file.close()
    return Written(results, files, time.perf_counter() - began)
