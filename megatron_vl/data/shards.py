"""Shards of samples in the webdataset format (tar files): written whole or not at all, read by offset."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_vl.config.errors import UserError
from megatron_vl.data.index import Location, Member
from megatron_vl.data.sample import SampleError
from megatron_vl.data.shard_file import OpenShard, sample_files


class ShardWriter:
    """Writes `folder/shard-000000.tar`, …; the same samples give the same bytes.

    Use as a context manager. A shard is written aside and renamed when it is complete; where the block ends
    with an exception, the unfinished shard is removed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1_000_000_000,
        max_sample_bytes: int = 64_000_000,
    ) -> None:
        """A shard is full at `max_samples` samples or `max_bytes` bytes. `folder` is made if it is missing.

        Raises UserError where `folder` has shards already.
        """
        self.folder = Path(folder)
        self.num_samples = 0
        self._max_samples, self._max_bytes, self._max_sample_bytes = max_samples, max_bytes, max_sample_bytes
        self._keys: set[str] = set()
        self._num_shards = 0
        self._shard: OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if found := sorted(self.folder.glob("*.tar")):
            raise UserError(
                f"{self.folder} has {len(found)} shards already, {found[0].name} first: remove them"
            )

    def write(self, key: str, fields: Mapping[str, Any], images: Mapping[str, bytes] | None = None) -> None:
        """Add one sample: `fields` becomes KEY.json; `images` maps "0.jpg", "1.png", … to encoded files.

        `key`: 1 to 80 of letters, digits, "-", "_", and "/" between them, used once in the folder. Raises
        SampleError where the sample is not as docs/data.md describes.
        """
        files = sample_files(key, fields, images or {}, str(self.folder), self._max_sample_bytes)
        if key in self._keys:
            raise SampleError("duplicate key", key, str(self.folder))
        self._keys.add(key)
        if self._shard is None:
            self._shard = OpenShard(self.folder / f"shard-{self._num_shards:06d}.tar")
            self._num_shards += 1
        self._shard.add(key, files)
        self.num_samples += 1
        if self._shard.num_samples >= self._max_samples or self._shard.num_bytes >= self._max_bytes:
            self._finish_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None and kind is not None:
            self._shard.discard()
        elif self._shard is not None:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._shard.finish()
        self._shard = None


class ShardReader:
    """Reads members of local shards by offset; safe to share between threads. Keeps few files open."""

    def __init__(self, max_open_files: int = 64) -> None:
        self._open = lru_cache(maxsize=max_open_files)(_File)

    def read(self, location: Location, member: Member) -> bytes:
        """The bytes of one member.

        Raises UserError, naming the shard, where it is missing or its size is not the index's.
        """
        return self._open(location.shard, location.shard_bytes).read(member)


class _File:
    """An open shard. It closes when the last thread lets go of it, not when the cache does."""

    def __init__(self, path: str, expected_bytes: int) -> None:
        self.descriptor = -1
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
        size = os.fstat(self.descriptor).st_size
        if size != expected_bytes:
            raise UserError(
                f"shard {path} has {size} bytes, its index says {expected_bytes}: it was changed since"
            )

    def read(self, member: Member) -> bytes:
        try:
            data = os.pread(self.descriptor, member.size, member.offset)
        except OSError as error:
            raise UserError(
                f"shard {self.path} cannot be read at byte {member.offset}: {error.strerror}"
            ) from error
        if len(data) != member.size:
            raise UserError(
                f"shard {self.path} ends before byte {member.offset + member.size}: it was changed"
            )
        return data

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
