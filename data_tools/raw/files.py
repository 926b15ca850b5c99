"""A folder of files that are a draft each: listed by name, read within bounds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_tools.raw.format import RecordError
from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_table import file_sha256


def list_files(folder: Path, suffixes: Sequence[str], field: str) -> list[str]:
    """The names of `folder`'s files, and of those in folders below it, relative to it and in order.

    Links are left out, which may lead elsewhere. Raises UserError, naming `field`, where there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{field} is {folder}, which is no folder")
    names = [path.relative_to(folder).as_posix() for path in _files(folder, suffixes)]
    if not names:
        raise UserError(f"{field} is {folder}, which holds no files of {', '.join(suffixes)}")
    return names


def read_file(path: Path, max_bytes: int) -> bytes:
    """Raises RecordError where it cannot be read or is larger than `max_bytes`."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise RecordError("sample too large", f"{size} bytes; data.max_sample_bytes is {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise RecordError("cannot be read", str(error.strerror)) from error


def read_text(path: Path, max_bytes: int) -> str:
    """Raises RecordError where it cannot be read, is larger than `max_bytes` or no UTF-8."""
    return decode(read_file(path, max_bytes))


def decode(data: bytes) -> str:
    """UTF-8, with a byte order mark or without. Raises RecordError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError("no text", f"no UTF-8: {error}") from error


def files_digest(folder: Path, suffixes: Sequence[str], images: Sequence[str] = ()) -> str:
    """Differs where the names of those files do, or what is in them; `images`, by suffix, are not read for it."""
    digest = hashlib.sha256()
    for path in _files(folder, images):
        digest.update(path.relative_to(folder).as_posix().encode(errors="surrogateescape") + b"\0")
    for path in _files(folder, suffixes):
        digest.update(
            f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink()
    )
