"""Reads the members of shards by offset, wherever the shards lie.

a path                  read in place
a url, fetch: ranges    a whole sample by one request, which serves its members
a url, fetch: shards    the copy in the node's cache
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_index import Location, Member
from megatron_vl.data.storage.folder import DEFAULT_ACCESS, SHARDS, AccessRule, Folder
from megatron_vl.data.storage.local import LocalFolder, read_exactly, unreadable
from megatron_vl.data.storage.opening import open_folder


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a process fetched from where shards lie, and those of the members that it was asked for.

    Where processes share a cache, only their sums tell something: one of them fetches what all of them use.
    """

    bytes_fetched: int = 0
    bytes_used: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """What came after `before`."""
        return Traffic(
            bytes_fetched=self.bytes_fetched - before.bytes_fetched,
            bytes_used=self.bytes_used - before.bytes_used,
        )


NO_TRAFFIC = Traffic()


class ShardReader:
    """Reads members of shards; safe to share between threads. Keeps few files open."""

    def __init__(
        self, access: AccessRule = DEFAULT_ACCESS, *, whole_samples: bool = True, max_open_files: int = 64
    ) -> None:
        """`whole_samples`: whoever asks for one member of a sample will ask for the others next."""
        self._shards = _Shards(access, whole_samples)
        self._open = lru_cache(maxsize=max_open_files)(self._shards.open)
        self._read_in_place, self._used = 0, 0
        self._counting = threading.Lock()

    def read(self, location: Location, member: Member) -> bytes:
        """The bytes of one member.

        Raises UserError, naming the shard, where it is missing or its size is not the index's.
        """
        shard = self._open(location.shard, location.shard_bytes)
        data = shard.read(location, member)
        with self._counting:
            self._used += len(data)
            self._read_in_place += len(data) if isinstance(shard, _OpenShard) else 0
        return data

    @property
    def traffic(self) -> Traffic:
        """What was read so far."""
        fetched = sum(folder.bytes_fetched for folder in list(self._shards.folders.values()))
        return Traffic(bytes_fetched=self._read_in_place + fetched, bytes_used=self._used)


class _Shard(Protocol):
    def read(self, location: Location, member: Member) -> bytes: ...


class _Shards:
    """Opens shards, each in the way that fits where it lies."""

    def __init__(self, access: AccessRule, whole_samples: bool) -> None:
        self.folders: dict[str, Folder] = {}
        self._access, self._whole_samples = access, whole_samples
        self._recent = threading.local()

    def open(self, shard: str, expected_bytes: int) -> _Shard:
        """Raises UserError where the shard is missing or has not `expected_bytes`."""
        url, _, name = shard.rpartition("/")
        folder = self.folders.get(url) or self.folders.setdefault(url, open_folder(url or ".", self._access))
        if isinstance(folder, LocalFolder):
            return _OpenShard(shard, expected_bytes)
        check_size(shard, folder.size(name), expected_bytes)
        if self._access.fetch == SHARDS:
            return _CachedShard(folder, name)
        return _RangedShard(folder, name, self._recent if self._whole_samples else None)


def check_size(shard: str, size: int, expected_bytes: int) -> None:
    """Raise UserError where a shard is not the indexed one."""
    if size != expected_bytes:
        raise UserError(
            f"shard {shard} has {size} bytes, its index says {expected_bytes}: it was changed since"
        )


class _OpenShard:
    """A shard at a path. It closes when the last thread lets go of it, not when the cache does."""

    def __init__(self, path: str, expected_bytes: int) -> None:
        self.descriptor = -1
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
        check_size(path, os.fstat(self.descriptor).st_size, expected_bytes)

    def read(self, location: Location, member: Member) -> bytes:
        try:
            return read_exactly(self.descriptor, member.offset, member.size, f"shard {self.path}")
        except OSError as error:
            raise UserError(
                f"shard {self.path} cannot be read at byte {member.offset}: {error.strerror}"
            ) from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _CachedShard:
    """A remote shard by its copy, which is never held open: what is evicted gives its space back at once."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    def read(self, location: Location, member: Member) -> bytes:
        while True:
            path = self._folder.local_path(self._name)
            try:
                with path.open("rb", buffering=0) as file:
                    return read_exactly(file.fileno(), member.offset, member.size, f"shard {location.shard}")
            except FileNotFoundError:
                continue  # evicted before it was open
            except OSError as error:
                raise unreadable(path, error) from error


class _RangedShard:
    """A remote shard by requests. `recent`, if given, holds the sample that this thread read last."""

    def __init__(self, folder: Folder, name: str, recent: threading.local | None) -> None:
        self._folder, self._name, self._recent = folder, name, recent

    def read(self, location: Location, member: Member) -> bytes:
        if self._recent is None:
            return self._folder.read_range(self._name, member.offset, member.size)
        start, stop = _span(location, member)
        sample = (location.shard, start, stop)
        if getattr(self._recent, "sample", None) != sample:
            self._recent.data = self._folder.read_range(self._name, start, stop - start)
            self._recent.sample = sample
        data: bytes = self._recent.data[member.offset - start :][: member.size]
        return data


def _span(location: Location, asked: Member) -> tuple[int, int]:
    """Where the members of a sample, which lie together, begin and end. Raises UserError beyond the shard's end."""
    members = [location.text, *location.images, asked]
    start, stop = min(member.offset for member in members), max(one.offset + one.size for one in members)
    if stop > location.shard_bytes:
        raise UserError(f"shard {location.shard} ends before byte {stop}: it was changed")
    return start, stop
