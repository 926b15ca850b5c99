"""Processes that render and check. Kept apart from the builder, since each of them imports this module."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TypeVar

MAX_WAITING_TASKS = 256

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(num_processes: int) -> Iterator[Executor]:
    """A pool that ends at once on an exception, and whose processes end with this one however it ends."""
    # Spawned, since a fork of a process with threads may hang.
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: Executor, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """What `work` gives for each task, in their order. Few tasks are made before their turn, however many there are."""
    waiting: deque[Future[Result]] = deque()
    for task in tasks:
        waiting.append(pool.submit(work, task))
        if len(waiting) == MAX_WAITING_TASKS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
