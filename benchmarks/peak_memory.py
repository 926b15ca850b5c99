"""How much more memory a piece of work takes at its peak than before it began."""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

_FORK = multiprocessing.get_context(
    "fork"
)  # what the work needs is there already, and counts before it begins


def extra_peak_bytes(work: Callable[[], object]) -> int:
    """Resident memory at the peak of `work()`, less that before it. It runs in a forked process, whose peak is its
    own; call this before the work has run here, as freed memory that is used again would not count."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_measure, args=(work, sender))
    process.start()
    sender.close()
    try:
        extra: int = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured work ended with exit code {process.exitcode}") from None
    process.join()
    return extra


def _measure(work: Callable[[], object], sender: Connection) -> None:
    before = psutil.Process(os.getpid()).memory_info().rss
    work()
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)  # Linux counts in KiB
