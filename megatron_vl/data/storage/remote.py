"""A folder that is reached by requests, which may fail: each is repeated while that may help.

read, read_range ── request, repeated ──> store
local_path ── the file in parts, each a request ──> its copy in the node's cache
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import get_loop, sync
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from megatron_vl.data.storage.cache import NodeCache
from megatron_vl.data.storage.folder import AccessRule, MissingError, StorageError
from megatron_vl.data.storage.local import check_bound
from megatron_vl.data.storage.store import Failure, Stat, Store

PART_BYTES = 32 * 2**20  # of a file that is fetched whole; a failure costs no more than one
MAX_WAIT_SECONDS = 60.0  # between attempts
NUM_LISTING_THREADS = 16  # where a listing tells no sizes

T = TypeVar("T")


class RemoteFolder:
    """A `Folder` over a `Store`. Requests run in fsspec's one loop; callers are threads, as many as they like."""

    def __init__(self, url: str, open_store: Callable[[], Store], access: AccessRule) -> None:
        """`open_store` is called when the first request is made, and again after a fork."""
        self.url, self._access, self._open_store = url, access, open_store
        self._cache = None if access.cache is None else NodeCache(access.cache, access.cache_bytes)
        self._stores: dict[int, Store] = {}  # by process: connections do not survive a fork
        self._stats: dict[str, Stat] = {}
        self._counting = threading.Lock()
        self._bytes_fetched = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that requests brought so far; not those of attempts that failed."""
        return self._bytes_fetched

    def sizes(self) -> dict[str, int]:
        listed = self._ask(self.url, lambda store: store.list())
        unknown = [name for name, size in listed.items() if size is None]
        with ThreadPoolExecutor(NUM_LISTING_THREADS) as threads:
            found = dict(zip(unknown, threads.map(self.size, unknown), strict=True))
        return {name: found[name] if size is None else size for name, size in listed.items()}

    def size(self, name: str) -> int:
        return self._stat(name).size

    def read(self, name: str, max_bytes: int) -> bytes:
        size = self.size(name)
        check_bound(self._file(name), size, max_bytes)
        return self.read_range(name, 0, size)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        async def fetch(store: Store) -> bytes:
            data = await store.fetch(name, offset, size)
            if len(data) != size:
                raise Failure(f"{len(data)} bytes came of the {size} from byte {offset}", passing=True)
            return data

        data = self._ask(self._file(name), fetch) if size else b""
        with self._counting:
            self._bytes_fetched += size
        return data

    def local_path(self, name: str) -> Path:
        url = self._file(name)
        if self._cache is None:
            raise StorageError(
                f"{url} is needed as a local file; set data.access.cache to a folder for copies"
            )
        stat = self._stat(name)

        def fill(descriptor: int) -> None:
            for offset in range(0, stat.size, PART_BYTES):
                part = self.read_range(name, offset, min(PART_BYTES, stat.size - offset))
                write_all(descriptor, part, offset)

        identity = hashlib.sha256(f"{url} {stat.size} {stat.version}".encode()).hexdigest()
        return self._cache.path(f"{identity[:32]}-{name}", stat.size, url, fill)

    def _stat(self, name: str) -> Stat:
        """Asked once: a file that changes while it is read is an error, which sizes and indexes tell."""
        if name not in self._stats:
            self._stats[name] = self._ask(self._file(name), lambda store: store.stat(name))
        return self._stats[name]

    def _file(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _ask(self, url: str, request: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        """What the request gives, at one of the attempts. Raises StorageError about `url`."""
        access, start = self._access, time.monotonic()
        retrying = Retrying(
            stop=stop_after_attempt(access.attempts),
            wait=wait_exponential(multiplier=access.backoff_seconds, max=MAX_WAIT_SECONDS)
            + wait_random(0, access.backoff_seconds),
            retry=retry_if_exception(lambda error: isinstance(error, Failure) and error.passing),
            reraise=True,
        )
        try:
            answer: T = retrying(self._attempt, request)
            return answer
        except FileNotFoundError as error:
            raise MissingError(f"{url} is not there") from error
        except Failure as failure:
            num_attempts = retrying.statistics["attempt_number"]
            tried = f", after {num_attempts} attempts in {time.monotonic() - start:.0f} s"
            cause = without_credentials(str(failure))
            raise StorageError(f"{url}: {cause}{tried if num_attempts > 1 else ''}") from None

    def _attempt(self, request: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        process = os.getpid()
        store = self._stores.get(process) or self._stores.setdefault(process, self._open_store())
        try:
            answer: T = sync(get_loop(), request, store, timeout=self._access.timeout_seconds)
            return answer
        except (FileNotFoundError, Failure):
            raise
        except TimeoutError as error:
            raise Failure(f"no answer within {self._access.timeout_seconds:g} s", passing=True) from error
        except store.errors as error:
            raise store.explain(error) from None


def without_credentials(text: str) -> str:
    """A message of a library without what may stand in a url: user and password, a signed query."""
    return re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", re.sub(r"://[^/\s@]*@", "://", text))


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
