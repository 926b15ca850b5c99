"""The table of an index: one line per shard, of fixed size, so that it can be mapped instead of held."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.storage.folder import Folder
from megatron_vl.data.storage.local import LocalFolder

TABLE_NAME = "shards.npy"
MAX_TABLE_BYTES = 1 << 30
MAX_NAME_BYTES = 96

_LINE = np.dtype(
    [
        ("name", f"S{MAX_NAME_BYTES}"),
        ("size_bytes", "<i8"),
        ("sha256", "S64"),
        ("index_sha256", "S64"),
        ("first_sample", "<i8"),
        ("num_samples", "<i8"),
        ("num_images", "<i8"),
        ("num_text_tokens", "<i8"),
        ("num_unreadable_images", "<i8"),
        ("max_image_pixels", "<i8"),
    ]
)
BYTES_PER_SHARD = _LINE.itemsize  # on disk; mapped, not held


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A line of the table. Hashes are sha256 in hex; `index_sha256` is of the shard's .index.npz.

    `first_sample` counts those of the shards before; `max_image_pixels` is of the largest image.
    """

    name: str
    size_bytes: int
    sha256: str
    index_sha256: str
    first_sample: int
    num_samples: int
    num_images: int
    num_text_tokens: int
    num_unreadable_images: int
    max_image_pixels: int


def table_entry(table: NDArray[Any], number: int) -> ShardEntry:
    """Line `number` of a table."""
    values: list[Any] = [
        value.decode() if isinstance(value, bytes) else value for value in table[number].tolist()
    ]
    return ShardEntry(**dict(zip(_LINE.names or (), values, strict=True)))


def write_table(path: Path, shards: Sequence[ShardEntry]) -> None:
    """Write the table of `shards`. Raises UserError where a shard's name is too long for it."""
    for shard in shards:
        if len(shard.name.encode()) > MAX_NAME_BYTES:
            raise UserError(
                f"{path.parent / shard.name}: the name of a shard has at most {MAX_NAME_BYTES} bytes"
            )
    with path.open("wb") as file:
        np.save(
            file,
            np.array([tuple(asdict(shard).values()) for shard in shards], dtype=_LINE),
            allow_pickle=False,
        )


def read_table(folder: Folder, sha256: str, remedy: str) -> NDArray[Any]:
    """The table of a folder: mapped where it lies on a path, held (BYTES_PER_SHARD each) where it is far.

    Raises UserError where it is not that of `sha256`.
    """
    problem = f"{folder.url}/{TABLE_NAME} is not the one that its index.json was written with; {remedy}"
    if isinstance(folder, LocalFolder):
        path = folder.local_path(TABLE_NAME)
        if file_sha256(path) != sha256:
            raise UserError(problem)
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    data = folder.read(TABLE_NAME, MAX_TABLE_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(problem)
    held: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return held


def file_sha256(path: Path) -> str:
    """sha256 hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
