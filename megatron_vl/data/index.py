"""The index of a folder of shards: what samples weigh and where their bytes are, so that plans read none.

folder/index.json                 format, fingerprints of the text rule, the hash of shards.npy
folder/shards.npy                 a table with one line per shard
folder/shard-000000.index.npz     one entry per sample, or per image of a sample, in the order of the shard

Nothing is held for a sample, and little for a shard: the table is mapped, a shard's columns are read when someone
stands in it. N samples of all shards, K shards.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_index import Location, ShardIndex, arrays_name, parse_arrays
from megatron_vl.data.shard_table import (
    TABLE_NAME,
    ShardEntry,
    file_sha256,
    read_table,
    table_entry,
    write_table,
)
from megatron_vl.data.storage.folder import DEFAULT_ACCESS, AccessRule, Folder, MissingError
from megatron_vl.data.storage.opening import open_folder
from megatron_vl.data.text import TextRule

INDEX_NAME = "index.json"
INDEX_FORMAT = "megatron-vl-index-2"
SHARD_SUFFIX = ".tar"
MAX_CACHED_SHARDS = 64  # whose columns are held; about 100 bytes a sample
MAX_INDEX_BYTES, MAX_ARRAYS_BYTES = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Header:
    """index.json. Sums over all shards stand here, so that no page of the table is touched for them."""

    format: str
    fingerprints: dict[str, str]
    table_sha256: str
    num_samples: int
    num_images: int
    num_text_tokens: int
    size_bytes: int
    max_image_pixels: int  # of the largest image


class SourceIndex:
    """What is known of one indexed folder, and where each of its samples lies.

    name: the source's name in the configuration.
    fingerprints: of the text rule, by what they are of.
    num_shards: K. num_samples: N. num_images, num_text_tokens, size_bytes: of all shards.
    first_samples: int64 [K], the first sample of each shard; mapped.
    digest: sha256 hex of all that was indexed, fingerprints included; independent of where the folder is.
    """

    def __init__(self, folder: Folder, name: str, access: AccessRule = DEFAULT_ACCESS) -> None:
        """`open` finds and checks what this takes as it is. Raises UserError where the index is damaged."""
        self.folder, self.name, self.access = folder, name, access
        self._header, self.digest = _read_index_file(folder)
        self._table = read_table(folder, self._header.table_sha256, _reindex(folder))
        self.num_shards, self.num_samples = len(self._table), self._header.num_samples
        self.num_images, self.num_text_tokens = self._header.num_images, self._header.num_text_tokens
        self.size_bytes, self.fingerprints = self._header.size_bytes, self._header.fingerprints
        self.first_samples: NDArray[np.int64] = self._table["first_sample"]
        self.columns = lru_cache(maxsize=MAX_CACHED_SHARDS)(self._read_columns)

    @classmethod
    def open(
        cls,
        url: str | Path,
        text_rule: TextRule,
        *,
        name: str,
        access: AccessRule = DEFAULT_ACCESS,
        max_image_pixels: int | None = None,
        build_command: str = "",
        check_shards: bool = True,
    ) -> "SourceIndex":
        """The index of the folder at `url`, checked against the text rule and, by one listing, against its
        shards.

        Raises UserError: folder or index missing (names `build_command` if given), another tokenizer or chat
        template, a shard missing, empty, not indexed or changed, an image of more than `max_image_pixels`.
        """
        folder = open_folder(url, access)
        try:
            index = cls(folder, name, access)
        except MissingError as error:
            raise _missing(folder, name, build_command) from error
        _check_fingerprints(index.fingerprints, text_rule.fingerprints, folder)
        if check_shards:
            _check_shards(folder, index)
        if max_image_pixels is not None and index._header.max_image_pixels > max_image_pixels:
            index._refuse_image_sizes(max_image_pixels)
        return index

    def shard(self, number: int) -> ShardEntry:
        """Line `number` of the table."""
        return table_entry(self._table, number)

    def shards(self) -> Iterator[ShardEntry]:
        """The table, line by line."""
        return (self.shard(number) for number in range(self.num_shards))

    def shard_with(self, sha256: str) -> str | None:
        """The name of the shard that was indexed with these bytes."""
        found = np.flatnonzero(self._table["sha256"] == sha256.encode())
        return self.shard(int(found[0])).name if len(found) else None

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The shards that hold samples `start` to `stop`, and which of their own samples these are."""
        number = self.shard_of(start)
        while start < stop:
            first = int(self.first_samples[number])
            end = min(stop, first + int(self._table["num_samples"][number]))
            yield number, slice(start - first, end - first)
            start, number = end, number + 1

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds sample `row`."""
        return int(np.searchsorted(self.first_samples, row, side="right")) - 1

    def locate(self, row: int) -> Location:
        """Where the bytes of sample `row` are. Raises UserError where the shard's columns cannot be read."""
        number = self.shard_of(row)
        entry = self._table[number]
        url = f"{self.folder.url}/{entry['name'].decode()}"
        return self.columns(number).locate(row - int(entry["first_sample"]), url, int(entry["size_bytes"]))

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        return self.locate(row).key

    def _read_columns(self, number: int) -> ShardIndex:
        entry = self.shard(number)
        name = arrays_name(entry.name)
        try:
            data = self.folder.read(name, MAX_ARRAYS_BYTES)
        except MissingError as error:
            raise UserError(f"{error}; {_reindex(self.folder)}") from error
        return parse_arrays(data, entry.index_sha256, f"{self.folder.url}/{name}", _reindex(self.folder))

    def _refuse_image_sizes(self, max_pixels: int) -> None:
        """Raise UserError naming an image beyond the limit."""
        beyond = np.flatnonzero(self._table["max_image_pixels"] > max_pixels)
        number = int(beyond[0])
        columns, first = self.columns(number), int(self.first_samples[number])
        num_pixels = columns.image_sizes.astype(np.int64).prod(axis=1)
        image = int(num_pixels.argmax())
        sample = int(np.searchsorted(columns.image_starts, image, side="right")) - 1
        width, height = columns.image_sizes[image]
        location = self.locate(first + sample)
        raise UserError(
            f"image {image - int(columns.image_starts[sample])} of sample {location.key!r} in {location.shard} has "
            f"{width} x {height} = {num_pixels[image]} pixels; data.max_image_pixels is {max_pixels}. "
            f"Raise it, or shrink the images beyond it, in {len(beyond)} shard(s) of {self.name}"
        )


def write_index(folder: Path, text_rule: TextRule, shards: Sequence[ShardEntry]) -> None:
    """Write shards.npy and index.json, which makes the shards' columns an index; atomic.

    Raises UserError where a shard's name is too long for the table.
    """
    aside = folder / f"{TABLE_NAME}.partial"
    write_table(aside, shards)
    header = _Header(
        format=INDEX_FORMAT,
        fingerprints=text_rule.fingerprints,
        table_sha256=file_sha256(aside),
        num_samples=sum(shard.num_samples for shard in shards),
        num_images=sum(shard.num_images for shard in shards),
        num_text_tokens=sum(shard.num_text_tokens for shard in shards),
        size_bytes=sum(shard.size_bytes for shard in shards),
        max_image_pixels=max(shard.max_image_pixels for shard in shards),
    )
    aside.replace(folder / TABLE_NAME)
    aside = folder / f"{INDEX_NAME}.partial"
    aside.write_text(json.dumps(asdict(header), indent=1))
    aside.replace(folder / INDEX_NAME)


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their names. Raises UserError where there are none."""
    shards = sorted(folder.glob(f"*{SHARD_SUFFIX}"))
    if not shards:
        raise UserError(f"{folder} holds no shards (*{SHARD_SUFFIX})")
    return shards


def _reindex(folder: Folder) -> str:
    return f"(re)index {folder.url} with `python -m data_tools.index data=NAME`"


def _missing(folder: Folder, name: str, build_command: str) -> UserError:
    """The folder, or the index in it, is not there."""
    try:
        files = folder.sizes()
    except MissingError:
        remedy = (
            f"build it with `{build_command}`" if build_command else "see docs/data.md for what it must hold"
        )
        return UserError(f"data.sources.{name}: the folder {folder.url} does not exist; {remedy}")
    lacking = next((file for file in (INDEX_NAME, TABLE_NAME) if file not in files), INDEX_NAME)
    return UserError(f"data.sources.{name}: {folder.url} has no {lacking}; {_reindex(folder)}")


def _read_index_file(folder: Folder) -> tuple[_Header, str]:
    """What index.json says, and its digest."""
    data, path = folder.read(INDEX_NAME, MAX_INDEX_BYTES), f"{folder.url}/{INDEX_NAME}"
    try:
        content = json.loads(data)
        if content["format"] != INDEX_FORMAT:
            raise UserError(f"{path} is not of the format {INDEX_FORMAT}; {_reindex(folder)}")
        return _Header(**content), hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {_reindex(folder)}") from error


def _check_fingerprints(indexed: dict[str, str], current: dict[str, str], folder: Folder) -> None:
    for what, fingerprint in current.items():
        if indexed.get(what) != fingerprint:
            raise UserError(
                f"{folder.url} was indexed with another {what}, of fingerprint {indexed.get(what, '')[:12]}; "
                f"the configured one has {fingerprint[:12]}, so token counts would be wrong; {_reindex(folder)}"
            )


def _check_shards(folder: Folder, index: SourceIndex) -> None:
    for problem in listing_problems(folder, index):
        raise UserError(problem)


def listing_problems(folder: Folder, index: SourceIndex) -> Iterator[str]:
    """Shards that are missing, have another size than was indexed, or were not indexed; by one listing."""
    sizes = {name: size for name, size in folder.sizes().items() if name.endswith(SHARD_SUFFIX)}
    for shard in index.shards():
        path, size = f"{folder.url}/{shard.name}", sizes.pop(shard.name, None)
        if size is None:
            yield f"shard {path} is missing; restore it, or {_reindex(folder)}"
        elif size == 0:
            yield f"shard {path} is empty; its index says {shard.size_bytes} bytes: restore it"
        elif size != shard.size_bytes:
            yield (
                f"shard {path} differs from its index: it has {size} bytes, not {shard.size_bytes}; "
                f"restore it, or {_reindex(folder)}"
            )
    for name in sorted(sizes):
        yield f"shard {folder.url}/{name} is not in its {INDEX_NAME}; {_reindex(folder)}"
