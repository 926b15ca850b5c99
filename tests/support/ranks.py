"""Runs a function on several gloo ranks of this machine."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vl.device.processes import die_with_parent

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo process group, and return what the ranks returned.

    Ranks are forked from a server that has torch and megatron-core imported: the first call of a test session
    waits for that (several seconds), every further one costs some tenths of one. A rank has one thread.

    Args:
        function: found by its module and name, so not a lambda or an inner function; it may use
            `torch.distributed.get_rank()` and any collective.
        args: pickled; the same for all ranks.

    Returns:
        One result per rank, in order. They are pickled too: return tensors and plain values.

    Raises:
        What the first failing rank raised, with its traceback as a note; the other ranks are killed.
        RuntimeError: a rank ended without a result.
        TimeoutError: the ranks ran longer than `timeout_seconds`; the message shows where each one was.
    """
    _wait_for_server()
    with tempfile.TemporaryDirectory() as directory:
        folder, end = Path(directory), time.monotonic() + timeout_seconds
        ranks = [
            _CONTEXT.Process(
                target=_rank_main, args=(rank, world_size, folder, timeout_seconds, end, function, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _await_all(ranks, folder, timeout_seconds, end)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


@cache
def _wait_for_server() -> None:
    """Its imports are none of the ranks' time."""
    process = _CONTEXT.Process(target=int)
    process.start()
    process.join()


def _await_all(ranks: list[BaseProcess], folder: Path, timeout_seconds: float, end: float) -> None:
    """Return when all ranks have ended well; raise as soon as one has not, or at the `end` of the monotonic clock."""
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = wait(list(running), timeout=max(0.0, end - time.monotonic()))
        if not ended:
            numbers = sorted(ranks.index(process) for process in running.values())
            stacks = "\n".join(f"rank {rank}: {_stack(folder / f'stack-{rank}')}" for rank in numbers)
            raise TimeoutError(
                f"ranks {numbers} of {len(ranks)} still ran after {timeout_seconds} s\n{stacks}"
            )
        for sentinel in ended:
            running.pop(sentinel).join()  # type: ignore[arg-type]
        if any(process.exitcode for process in ranks):
            _raise_first_failure(ranks, folder)


def _stack(path: Path) -> str:
    return path.read_text() if path.exists() else "has not begun"


def _raise_first_failure(ranks: list[BaseProcess], folder: Path) -> None:
    """Raise what went wrong first: the other ranks fail after it, as their peer is gone."""
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise pickle.loads(errors[0].read_bytes())
    codes = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode}
    raise RuntimeError(f"ranks ended without a result; exit codes by rank: {codes}")


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout_seconds: float,
    end: float,
    function: Callable[..., Any],
    args: Any,
) -> None:
    """The life of one rank: join, call, leave the result in a file. Its stack lies there before the `end`."""
    die_with_parent()
    ahead = timeout_seconds / 3 if timeout_seconds < 10 else 3.0
    left = max(0.01, end - ahead - time.monotonic())
    faulthandler.dump_traceback_later(left, file=(folder / f"stack-{rank}").open("w"))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        torch.save(function(*args), folder / f"result-{rank}")
        dist.barrier()  # a rank that leaves early would break a collective that others are still in
        dist.destroy_process_group()
    except BaseException as error:
        _leave_error(error, rank, world_size, folder)
        sys.stdout.flush()
        os._exit(1)  # without waiting for threads that wait for this rank


def _leave_error(error: BaseException, rank: int, world_size: int, folder: Path) -> None:
    note = f"raised by rank {rank} of {world_size}:\n{traceback.format_exc()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some exceptions cannot be pickled, or one way only
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    (folder / f"error-{rank}").write_bytes(pickle.dumps(error))
