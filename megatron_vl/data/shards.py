"""Shards of samples in the webdataset format (tar files), written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_vl.config.errors import UserError
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
