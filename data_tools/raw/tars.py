"""Tars in the webdataset layout, as img2dataset writes them: the files of a record lie together, under one key."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.raw.format import RecordError
from data_tools.raw.places import Places
from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_FORMATS
from megatron_vl.data.tar import walk_tar


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The bytes of a tar that hold the files of record `number`, headers included."""

    number: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"record {self.number}"

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """The fields of its .json; `image` or `images`, as bytes; `text` of its .txt, if there is no caption.

        Raises RecordError where it is longer than `max_bytes`, or a file cannot be used.
        """
        if self.size > max_bytes:
            raise RecordError("record too large", f"{self.size} bytes; data.max_sample_bytes is {max_bytes}")
        with path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        files = _files(data)
        images = [content for name, content in files.items() if _extension(name) in IMAGE_FORMATS]
        record = next((_fields(content) for name, content in files.items() if _extension(name) == "json"), {})
        record |= {"image": images[0]} if len(images) == 1 else {"images": images} if images else {}
        for name, content in files.items():
            if _extension(name) == "txt" and not record.get("caption"):
                record["text"] = _decoded(content).strip()
        return record


class Stretches(Places[Stretch]):
    """The records of a tar, 16 bytes each."""

    def __init__(self, bounds: Iterator[tuple[int, int]]) -> None:
        flat = np.fromiter((value for bound in bounds for value in bound), dtype=np.int64)
        self._bounds: NDArray[np.int64] = flat.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._bounds)

    def _at(self, number: int) -> Stretch:
        start, end = self._bounds[number].tolist()
        return Stretch(number=number, offset=start, size=end - start)


def locate_in_tar(path: Path, field: str, max_bytes: int) -> Stretches:
    """The records of a tar. Raises UserError, naming `field` or the tar and byte, where it is damaged."""
    del max_bytes
    try:
        return Stretches(_bounds(path))
    except OSError as error:
        raise UserError(f"{field} has {path}, which cannot be read: {error.strerror}") from error


def _bounds(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end of each run of files with the same key."""
    key, start, end = "", 0, 0
    with path.open("rb") as file:
        for member in walk_tar(path, file):
            if (found := _key(member.name)) != key and key:
                yield start, end
                start = end
            key = found
            end = -(-(member.offset + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if key:
        yield start, end


def _files(data: bytes) -> dict[str, bytes]:
    """By name. Raises RecordError for a name that would lead out of the folder that it is extracted to."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is None:
                continue
            path = PurePosixPath(info.name)
            if path.is_absolute() or ".." in path.parts:
                raise RecordError("unsafe name", f"{info.name!r} leads out of the tar's folder")
            files[info.name] = file.read()
    return files


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise RecordError("not a record", f"its JSON is a {type(fields).__name__}; an object is needed")
    return fields


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError("no text", f"its .txt is no UTF-8: {error}") from error
