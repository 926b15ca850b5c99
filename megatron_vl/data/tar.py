"""A strict walk through a tar file.

Python's tarfile and webdataset take a garbage header in the middle for the end of the file and drop the rest
without a word; here, what follows the last member must be the end marker and zeros to the end of the file.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vl.config.errors import UserError

END_MARKER_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, at least
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of one extended header: long names and the like
# Of headers that are none: numbers are no numbers, extended headers extend each other without end.
_DAMAGE = (tarfile.TarError, ValueError, RecursionError)


class DamageError(UserError):
    """A tar that cannot be read on from byte `offset`."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)  # both in args, so that it survives pickling
        self.message, self.offset = message, offset

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def walk_tar(path: Path, file: IO[bytes]) -> Iterator[TarMember]:
    """The regular files of an open tar, in order, without its folders. The caller may move `file`'s position.

    Raises DamageError, naming the shard and the byte, where the tar is empty or truncated, has garbage between
    members, holds anything but files and folders, or declares a size that the file has not. Names are as they are.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers: Any = _Headers(file)  # a file as far as reading goes
    try:
        tar = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 (it owns nothing but `file`)
    except _DAMAGE as error:
        raise DamageError(f"shard {path} is no tar file: {error}", 0) from error
    while True:
        try:
            info = tar.next()
        except _DAMAGE as error:
            raise DamageError(
                f"shard {path} is damaged after byte {tar.offset}: {error}", tar.offset
            ) from error
        if info is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it saw
        if info.isdir():
            continue
        if complaint := _complaint(info, num_bytes):
            raise DamageError(f"shard {path}: {info.name!r} at byte {info.offset} {complaint}", info.offset)
        yield TarMember(name=info.name, offset=info.offset_data, size=info.size)
    _check_end(path, file, tar.offset)


def _complaint(info: tarfile.TarInfo, num_bytes: int) -> str | None:
    """Why a member of a shard of `num_bytes` is none to read."""
    if not info.isreg() or info.issparse() or info.size < 0:
        return "is no regular file"
    if info.offset_data + info.size > num_bytes:
        return (
            f"declares {info.size} bytes, but the shard ends at byte {num_bytes}: it is truncated or damaged"
        )
    return None


class _Headers:
    """What tarfile reads of a file. It takes an extended header of any declared size for one to read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    file.seek(offset)
    num_zeros = 0
    while chunk := file.read(CHUNK_BYTES):
        if chunk.count(0) != len(chunk):
            start = offset + num_zeros
            raise DamageError(
                f"shard {path} is damaged at byte {start}: neither a file's header nor the end of the tar",
                start,
            )
        num_zeros += len(chunk)
    if num_zeros < END_MARKER_BYTES:
        end = offset + num_zeros
        raise DamageError(f"shard {path} is truncated: it ends at byte {end} without tar's end marker", end)
