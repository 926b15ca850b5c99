"""Shards of one folder, written so that a writer which was interrupted anywhere goes on from a position."""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_tools.recipe import Record
from megatron_vl.data.shard_file import OpenShard, aside_path, sample_files

MAX_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a folder is: samples in all, finished shards, and what the open shard holds."""

    num_samples: int = 0
    num_shards: int = 0
    open_samples: int = 0
    open_bytes: int = 0


class FolderWriter:
    """Writes `folder/shard-000000.tar`, …, going on from `position`; what lies beyond that is written again."""

    def __init__(self, folder: Path, max_samples: int, position: Position) -> None:
        self.folder, self.num_samples = folder, position.num_samples
        self._max_samples, self._num_shards = max_samples, position.num_shards
        self._shard: OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if position.open_bytes:
            if self._path().exists():  # completed after `position`
                self._path().replace(aside_path(self._path()))
            self._shard = OpenShard(
                self._path(), num_bytes=position.open_bytes, num_samples=position.open_samples
            )

    def write(self, number: int, record: Record) -> bool:
        """Add a sample of draft `number`; True where it completed a shard.

        Keys are FOLDER-000012, and FOLDER-000012-1, -2, … for its further samples. Raises SampleError.
        """
        suffix = f"-{record.index}" if record.index else ""
        key = f"{self.folder.name}-{number:06d}{suffix}"
        files = sample_files(
            key, record.fields, record.images, str(self.folder), sys.maxsize
        )  # bounded when rendered
        if self._shard is None:
            self._shard = OpenShard(self._path())
        self._shard.add(key, files)
        self.num_samples += 1
        is_full = self._shard.num_samples >= self._max_samples or self._shard.num_bytes >= MAX_SHARD_BYTES
        if is_full:
            self.finish()
        return is_full

    def position(self) -> Position:
        """Where this is, all written to disk."""
        if self._shard is not None:
            self._shard.flush()
        return Position(
            num_samples=self.num_samples,
            num_shards=self._num_shards,
            open_samples=self._shard.num_samples if self._shard else 0,
            open_bytes=self._shard.num_bytes if self._shard else 0,
        )

    def finish(self) -> None:
        """Complete the open shard."""
        if self._shard is not None:
            self._shard.finish()
            self._shard = None
            self._num_shards += 1

    def close(self) -> None:
        """Leave the open shard as it is."""
        if self._shard is not None:
            self._shard.close()

    def _path(self) -> Path:
        return self.folder / f"shard-{self._num_shards:06d}.tar"
