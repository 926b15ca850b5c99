"""Builds the index of a folder of shards (see `index.py`) by reading every shard from end to end.

members of a tar ── grouped by key ──> samples ── checked, tokenised in batches ──> arrays of the shard
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import numpy as np

from megatron_vl.config.errors import UserError
from megatron_vl.data.images import read_size
from megatron_vl.data.index import INDEX_NAME, list_shards, write_index
from megatron_vl.data.sample import Sample, SampleError, order_images, parse_sample
from megatron_vl.data.shard_index import ShardArrays, arrays_name
from megatron_vl.data.shard_table import ShardEntry, file_sha256
from megatron_vl.data.tar import TarMember, walk_tar
from megatron_vl.data.text import TextRule

BATCH_SIZE = 256  # samples tokenised at once


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """Counts of one folder. Unreadable images are those whose header no decoder understands."""

    num_shards: int
    num_samples: int
    num_images: int
    num_text_tokens: int
    num_unreadable_images: int
    size_bytes: int


def build_index(
    folder: str | Path,
    text_rule: TextRule,
    *,
    max_sample_bytes: int,
    num_processes: int = 1,
    on_shard: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Index every `*.tar` of `folder`; `on_shard(done, total)` is called as shards are done.

    An interrupted build leaves no index. An image that cannot be read is counted: it
    is training that masks it. Raises UserError naming the shard and byte (empty, truncated, garbage), or
    SampleError naming shard and key (bad JSON, images that do not match the marks, a duplicate key, more than
    `max_sample_bytes`).
    """
    folder = Path(folder)
    shards = list_shards(folder)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    entries: list[ShardEntry] = []
    num_samples = 0
    for entry in _index_shards(shards, text_rule, max_sample_bytes, min(num_processes, len(shards))):
        entries.append(replace(entry, first_sample=num_samples))
        num_samples += entry.num_samples
        if on_shard is not None:
            on_shard(len(entries), len(shards))
    write_index(folder, text_rule, entries)
    return IndexSummary(
        num_shards=len(entries),
        num_samples=num_samples,
        num_images=sum(entry.num_images for entry in entries),
        num_text_tokens=sum(entry.num_text_tokens for entry in entries),
        num_unreadable_images=sum(entry.num_unreadable_images for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
    )


def _index_shards(
    shards: list[Path], text_rule: TextRule, max_sample_bytes: int, num_processes: int
) -> Iterator[ShardEntry]:
    """Entries in the order of the shards."""
    if num_processes == 1:
        yield from (index_shard(shard, text_rule, max_sample_bytes) for shard in shards)
        return
    # Spawned, since a fork of a process with the tokenizer's threads may hang. One thread of them in each.
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_single_thread)
    try:
        futures = [pool.submit(index_shard, shard, text_rule, max_sample_bytes) for shard in shards]
        yield from (future.result() for future in futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _single_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def index_shard(path: Path, text_rule: TextRule, max_sample_bytes: int) -> ShardEntry:
    """Read one shard, write its arrays beside it; its `first_sample` is 0. Raises as `build_index` does."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"shard {path} is empty")
    table = _ShardTable(path, text_rule)
    with path.open("rb") as file:
        for key, members in group_samples(path, walk_tar(path, file)):
            num_bytes = sum(member.size for member in members.values())
            if num_bytes > max_sample_bytes:
                detail = f"{num_bytes} bytes; data.max_sample_bytes is {max_sample_bytes}"
                raise SampleError("sample too large", key, str(path), detail)
            table.add(key, members, file)
    arrays = table.arrays()
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    target = path.parent / arrays_name(path.name)
    aside = target.with_suffix(".npz.partial")
    aside.write_bytes(data.getbuffer())
    aside.replace(target)
    return ShardEntry(
        name=path.name,
        size_bytes=size,
        sha256=file_sha256(path),
        index_sha256=hashlib.sha256(data.getbuffer()).hexdigest(),
        first_sample=0,
        num_samples=len(arrays["keys"]),
        num_images=len(arrays["image_sizes"]),
        num_text_tokens=int(arrays["num_text_tokens"].sum(dtype=np.int64)),
        num_unreadable_images=int((arrays["image_sizes"][:, 0] == 0).sum()),
        max_image_pixels=int(arrays["image_sizes"].astype(np.int64).prod(axis=1).max(initial=0)),
    )


def group_samples(path: Path, members: Iterator[TarMember]) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Keys with their files by extension ("json", "0.jpg"). A sample's files lie together.

    Raises SampleError where a key or a file comes twice, UserError where a name leads out of a folder, or there is
    no sample.
    """
    seen: set[str] = set()
    current: tuple[str, dict[str, TarMember]] | None = None
    for member in members:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise UserError(
                f"shard {path}: {member.name!r} at byte {member.offset} leads out of the folder that a tar is unpacked "
                "in; names are relative, without .."
            )
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if current is None or current[0] != key:
            if current is not None:
                yield current
            if key in seen:
                detail = f"its files lie apart, {member.name} again at byte {member.offset}"
                raise SampleError("duplicate key", key, str(path), detail)
            seen.add(key)
            current = (key, {})
        if extension in current[1]:
            raise SampleError("duplicate file", key, str(path), f"{member.name} at byte {member.offset}")
        current[1][extension] = member
    if current is None:
        raise UserError(f"shard {path} is empty: it holds no sample")
    yield current


class _ShardTable:
    """The arrays of one shard as they grow, and the samples that wait to be tokenised."""

    def __init__(self, path: Path, text_rule: TextRule) -> None:
        self._shard, self._text_rule = str(path), text_rule
        self._keys: list[bytes] = []
        self._text_members: list[tuple[int, int]] = []
        self._num_text_tokens: list[int] = []
        self._num_images: list[int] = []
        self._image_members: list[tuple[int, int]] = []
        self._image_sizes: list[tuple[int, int]] = []
        self._waiting: list[Sample] = []

    def add(self, key: str, members: dict[str, TarMember], file: IO[bytes]) -> None:
        """Read one sample's files. Raises SampleError."""
        if "json" not in members:
            raise SampleError("no JSON", key, self._shard, f"{key}.json must lie beside {', '.join(members)}")
        text = members.pop("json")
        sample = parse_sample(_read(file, text), key, self._shard, text.size)
        for name in order_images(members, sample.num_images, key, self._shard):
            image = members[name]
            self._image_members.append((image.offset, image.size))
            self._image_sizes.append(read_size(_read(file, image)))
        self._keys.append(key.encode(errors="surrogateescape"))
        self._text_members.append((text.offset, text.size))
        self._num_images.append(sample.num_images)
        self._waiting.append(sample)
        if len(self._waiting) == BATCH_SIZE:
            self._tokenise()

    def arrays(self) -> ShardArrays:
        """As `shard_index.py` reads them. N samples, I images."""
        self._tokenise()
        return {
            "keys": np.array(self._keys),  # bytes, UTF-8
            "num_text_tokens": np.array(self._num_text_tokens, dtype=np.int32),  # [N]
            "num_images": np.array(self._num_images, dtype=np.int32),  # [N]
            "text_members": np.array(self._text_members, dtype=np.int64),  # [N, 2]: offset, size
            "image_members": np.array(self._image_members, dtype=np.int64).reshape(-1, 2),  # [I, 2]
            "image_sizes": np.array(self._image_sizes, dtype=np.int32).reshape(
                -1, 2
            ),  # [I, 2]: width, height
        }

    def _tokenise(self) -> None:
        self._num_text_tokens += self._text_rule.count_text_tokens(self._waiting)
        self._waiting = []


def _read(file: IO[bytes], member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
