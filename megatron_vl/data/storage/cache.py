"""A folder on the node's own disk that keeps copies of remote files, for all processes of the node.

KEY            a copy, complete; its time of modification is when it was last used
KEY.partial    one being fetched by the process that holds a lock on it; if none does, a leftover of a killed one
.lock          held, for moments, by who changes what is there

No process remembers what is there, so any of them may be killed at any time, and several runs may share a cache.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from megatron_vl.data.storage.folder import StorageError

FOLDER = "megatron-vl-cache"  # within the folder that the user names: nothing else in there is touched
PARTIAL, LOCK = ".partial", ".lock"
POLL_SECONDS = 0.05  # while what others are fetching leaves no room


class NodeCache:
    """Copies of at most `max_bytes` in all; the least recently used go first.

    A copy that goes stays readable for those who have it open, and takes its space until they close it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder / FOLDER, max_bytes

    def path(self, key: str, size: int, url: str, fill: Callable[[int], None]) -> Path:
        """The copy `key`. Where there is none, one process of the node makes it and the others wait.

        `fill` writes the `size` bytes of the file at `url` to the descriptor that it is given. Raises StorageError
        where the file is larger than the cache, or the disk is full or cannot be written; what `fill` raises.
        """
        if size > self.max_bytes:
            raise StorageError(
                f"{url} has {size} bytes, more than data.access.cache_bytes={self.max_bytes}; raise it"
            )
        copy = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not _is_there(copy, size):
                self._make(copy, size, fill)
        except OSError as error:
            raise StorageError(
                f"data.access.cache: {self.folder} cannot take the {size} bytes of {url}: {error.strerror}"
            ) from error
        return copy

    def _make(self, copy: Path, size: int, fill: Callable[[int], None]) -> None:
        """Make the copy, or wait until another process did, or failed to."""
        aside = copy.with_name(copy.name + PARTIAL)
        with _locked(aside) as descriptor:
            if not _is_at(descriptor, aside):
                return  # whoever had the lock is done, and took the file away
            try:
                if copy.exists():
                    aside.unlink()
                    return
                os.ftruncate(descriptor, 0)  # a leftover's bytes count no more
                self._reserve(descriptor, size)
                fill(descriptor)
                os.fsync(descriptor)
                with self._changing():
                    aside.rename(copy)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise

    def _reserve(self, descriptor: int, size: int) -> None:
        """Give the file its size, which counts from now on. Waits while what others fetch leaves no room."""
        while True:
            with self._changing():
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Evict until `size` more bytes fit; False where what is being fetched leaves too few."""
        copies, taken = [], 0
        for path in self.folder.iterdir():
            if path.suffix == PARTIAL and _remove_leftover(path):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # a fetch that failed just now
            taken += status.st_size
            if path.suffix != PARTIAL and path.name != LOCK:
                copies.append((status.st_mtime_ns, status.st_size, path))
        for _, freed, path in sorted(copies):
            if taken + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)  # gone where it was found to be damaged
            taken -= freed
        return taken + size <= self.max_bytes

    def _changing(self) -> AbstractContextManager[int]:
        return _locked(self.folder / LOCK)


def _is_there(copy: Path, size: int) -> bool:
    """Whether the copy is there; then it counts as used now. One of another size was damaged: it is removed."""
    try:
        if copy.stat().st_size == size:
            now = time.time_ns()  # finer than the clock that the system would take
            os.utime(copy, ns=(now, now))
            return True
        copy.unlink()
    except FileNotFoundError:
        pass  # not there, or evicted in between
    return False


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The descriptor of a file, made if it is missing, that no other thread or process has locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a forked child has the descriptor too
        os.close(descriptor)


def _remove_leftover(path: Path) -> bool:
    """Remove a partial copy that nobody is fetching."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
