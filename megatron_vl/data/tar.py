"""A strict walk through a tar file.

Python's tarfile and webdataset take a garbage header in the middle for the end of the file and drop the rest
without a word; here, what follows the last member must be the end marker and zeros to the end of the file.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_vl.config.errors import UserError

END_MARKER_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, at least
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def walk_tar(path: Path, file: IO[bytes]) -> Iterator[TarMember]:
    """The regular files of an open tar, in order, without its folders. The caller may move `file`'s position.

    Raises UserError, naming the shard and the byte, where the tar is empty or truncated, has garbage between
    members, or holds anything but files and folders.
    """
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing but `file`)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"shard {path} is no tar file: {error}") from error
    while True:
        try:
            info = tar.next()
        except (tarfile.TarError, ValueError) as error:  # ValueError: numbers in extended headers
            raise UserError(f"shard {path} is damaged after byte {tar.offset}: {error}") from error
        if info is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it saw
        if info.isdir():
            continue
        if not info.isreg() or info.issparse() or info.size < 0:
            raise UserError(f"shard {path}: {info.name!r} at byte {info.offset} is no regular file")
        yield TarMember(name=info.name, offset=info.offset_data, size=info.size)
    _check_end(path, file, tar.offset)


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    file.seek(offset)
    num_zeros = 0
    while chunk := file.read(CHUNK_BYTES):
        if chunk.count(0) != len(chunk):
            start = offset + num_zeros
            raise UserError(
                f"shard {path} is damaged at byte {start}: neither a file's header nor the end of the tar"
            )
        num_zeros += len(chunk)
    if num_zeros < END_MARKER_BYTES:
        raise UserError(
            f"shard {path} is truncated: it ends at byte {offset + num_zeros} without tar's end marker"
        )
