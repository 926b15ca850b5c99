"""What is wrong with one shard: read from end to end, held against its index, every image decoded.

tar ── walked member by member ──> samples ── names, JSON, images ──> lines for people
                                      └────── where they lie ───────> held against the index
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from PIL import Image

from megatron_vl.config.errors import UserError
from megatron_vl.data.images import FORMATS
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import group_samples
from megatron_vl.data.sample import SampleError, order_images, parse_sample
from megatron_vl.data.shard_index import Location, Member
from megatron_vl.data.shard_table import ShardEntry, file_sha256
from megatron_vl.data.storage.folder import AccessRule, MissingError
from megatron_vl.data.storage.opening import open_folder
from megatron_vl.data.tar import DamageError, TarMember, walk_tar

Files = dict[str, TarMember]  # of a sample, by extension


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to look at, by values that another process can find it with. Limits as in DataConfig."""

    source: str
    url: str
    access: AccessRule
    number: int
    max_sample_bytes: int
    max_image_pixels: int


def shard_problems(task: ShardTask) -> list[str]:
    """A line for each thing that is wrong: the shard, and where a sample is affected its key and byte.

    That a shard is not there, is empty or has another size than the index says is for `listing_problems` to tell.
    """
    try:
        index = _open(task.source, task.url, task.access)
        index.columns.cache_clear()  # those of one shard are enough
        entry = index.shard(task.number)
        path = index.folder.local_path(entry.name)
        if not path.stat().st_size:
            return []
        return [*_difference(path, entry, index), *_walk(path, index, task)]
    except MissingError:
        return []
    except (UserError, OSError) as error:
        return [str(error)]


@lru_cache(maxsize=1)
def _open(source: str, url: str, access: AccessRule) -> SourceIndex:
    """Sources come one after the other."""
    return SourceIndex(open_folder(url, access), source, access)


def _difference(path: Path, entry: ShardEntry, index: SourceIndex) -> Iterator[str]:
    if path.stat().st_size != entry.size_bytes:
        return
    found = file_sha256(path)
    if found != entry.sha256:
        other = index.shard_with(found)
        known = f", those of {other}" if other else ""
        yield f"shard {path} differs from its index: sha256 {found[:12]}, not {entry.sha256[:12]}{known}"


def _walk(path: Path, index: SourceIndex, task: ShardTask) -> Iterator[str]:
    """The samples one by one. What breaks the walk is told last, with the samples that the index has behind it."""
    entry, first = index.shard(task.number), int(index.first_samples[task.number])
    num_read, is_as_indexed = 0, True
    try:
        with path.open("rb") as file:
            for key, files in group_samples(path, walk_tar(path, file)):
                yield from _sample_problems(path, key, files, file, task)
                if is_as_indexed and num_read < entry.num_samples:
                    difference = _misplaced(key, files, index.locate(first + num_read))
                    is_as_indexed = difference is None
                    yield from [f"shard {path}: {difference}"] if difference else []
                num_read += 1
    except DamageError as error:
        following = (index.locate(first + place) for place in range(num_read, entry.num_samples))
        lost = [location for location in following if _span(location)[1] > error.offset]
        yield f"{error}; lost: {_place(lost[0])}, and {len(lost) - 1} after it" if lost else str(error)
        return
    except UserError as error:
        yield str(error)
        return
    if is_as_indexed and num_read != entry.num_samples:
        yield f"shard {path} holds {num_read} samples, its index says {entry.num_samples}"


def _sample_problems(path: Path, key: str, files: Files, file: IO[bytes], task: ShardTask) -> Iterator[str]:
    sample, shard = f"sample {key!r} in {path}", str(path)
    begin = min(member.offset for member in files.values())
    num_bytes = sum(member.size for member in files.values())
    if num_bytes > task.max_sample_bytes:
        yield f"{sample}: {num_bytes} bytes at byte {begin}; data.max_sample_bytes is {task.max_sample_bytes}"
        return
    images = {extension: member for extension, member in files.items() if extension != "json"}
    if "json" not in files:
        yield f"{sample}: no JSON: {key}.json must lie beside {', '.join(images)} (at byte {begin})"
        return
    text = files["json"]
    try:
        parsed = parse_sample(_read(file, text), key, shard, text.size)
    except SampleError as error:
        yield f"{error} (at byte {text.offset})"
        return
    try:
        names = order_images(images, parsed.num_images, key, shard)
    except SampleError as error:
        yield f"{error} (its files begin at byte {begin})"
        return
    for number, name in enumerate(names):
        complaint = _image_complaint(_read(file, images[name]), task.max_image_pixels)
        if complaint:
            yield f"{sample}: image {number} at byte {images[name].offset} {complaint}"


def _image_complaint(data: bytes, max_pixels: int) -> str | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:  # before its pixels take memory
                return f"says {image.width} x {image.height} pixels; data.max_image_pixels is {max_pixels}"
            image.load()
    except Exception as error:  # Pillow's plugins raise many kinds on garbage
        return f"cannot be decoded: {error}"
    return None


def _misplaced(key: str, files: Files, indexed: Location) -> str | None:
    """In words, where a sample is not what the index has in its place."""
    found = {Member(offset=member.offset, size=member.size) for member in files.values()}
    if key == indexed.key and found == {indexed.text, *indexed.images}:
        return None
    begin = min(member.offset for member in files.values())
    if key == indexed.key:
        return f"the files of sample {key!r}, from byte {begin} on, are not those that its index has"
    return f"sample {key!r} at byte {begin} stands where the index has {_place(indexed)}"


def _place(location: Location) -> str:
    """A sample of the index."""
    return f"{location.key!r} at byte {_span(location)[0]}"


def _span(location: Location) -> tuple[int, int]:
    """Where a sample's files begin and end in their shard."""
    members = (location.text, *location.images)
    return min(member.offset for member in members), max(member.offset + member.size for member in members)


def _read(file: IO[bytes], member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
