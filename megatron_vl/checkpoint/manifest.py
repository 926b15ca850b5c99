"""Which files a checkpoint consists of, with sizes and digests: how a whole one is told from a damaged one. No torch.

`manifest.json` is written last, so a folder that has one was written to its end. `sha256sum` computes the same digests.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MANIFEST_FILE = "manifest.json"
VERSION = 1
MAX_MANIFEST_BYTES = 1 << 28
PIECE = 256 << 20  # bytes that go to disk at once


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    num_bytes: int
    sha256: str


class DigestedFile:
    """A new file, for what writes from its beginning to its end: it counts and digests what it is given, and is on disk
    when it is closed. Raises OSError as files do, at the end of the context too, as torch's writer makes another error
    of it.

    It goes to disk PIECE by piece, each told by a call of `moved`: whoever watches a slow disk sees that it moves.
    """

    def __init__(self, path: Path, moved: Callable[[], None] = lambda: None) -> None:
        self._file, self._moved = path.open("wb"), moved
        self._digest, self._num_bytes = hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Any buffer of bytes. Other threads run meanwhile."""
        content = memoryview(data).cast("B")
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            try:
                self._file.write(piece)
                if self._num_bytes // PIECE != (self._num_bytes + len(piece)) // PIECE:
                    self._to_disk()
            except OSError as error:
                self._error = error
                raise
            self._digest.update(piece)
            self._num_bytes += len(piece)
        return len(content)

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        """Nothing: `close` does."""

    def close(self) -> FileRecord:
        """Bring it to disk."""
        with self._file:
            self._to_disk()
        return FileRecord(self._num_bytes, self._digest.hexdigest())

    def _to_disk(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._moved()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # after an error, which has been told; `close` has closed it otherwise
            self._file.close()
        if self._error is not None and error is not self._error:
            raise self._error from error


def digested(path: Path) -> FileRecord:
    """A file as it is now, read piece by piece."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def seal(folder: Path, known: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder that is complete: of files in `known`, by path within the folder, and of all
    others, which are read once more."""
    files = dict(known)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = digested(path)
    document = {"version": VERSION, "files": {name: asdict(files[name]) for name in sorted(files)}}
    with DigestedFile(folder / MANIFEST_FILE) as file:
        file.write(json.dumps(document, indent=0).encode())
        file.close()


def sync_folder(folder: Path, but: Container[str] = ()) -> None:
    """Wait until all that is in a folder is on disk, `but` files that are known to be."""
    for path in [*folder.rglob("*"), folder]:
        if path.relative_to(folder).as_posix() not in but:
            sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint by their path within it.

    Raises:
        ValueError: there is no manifest, or it is torn.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST_FILE} has more than {MAX_MANIFEST_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(
                f"{MANIFEST_FILE} has format {document['version']}; this version reads {VERSION}"
            )
        return {name: FileRecord(**record) for name, record in document["files"].items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_FILE} is missing") from None
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{MANIFEST_FILE} is torn: {error}") from error


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as sizes tell, and the digests of its JSON files; None for nothing."""
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, record in files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if num_bytes != record.num_bytes:
            return f"{name} has {num_bytes} bytes of {record.num_bytes}"
    return wrong_digest(folder, files, [name for name in files if name.endswith(".json")])


def wrong_digest(folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> str | None:
    """The first of these files whose content is not what was written; None for none."""
    for name in names:
        try:
            if digested(folder / name) != files[name]:
                return f"the content of {name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def shares(files: Mapping[str, FileRecord], num_ranks: int) -> Sequence[list[str]]:
    """The files dealt among ranks, so that each has about as many bytes to read; the same wherever it is called."""
    dealt: list[list[str]] = [[] for _ in range(num_ranks)]
    least = [(0, rank) for rank in range(num_ranks)]
    for name in sorted(files, key=lambda name: (-files[name].num_bytes, name)):
        num_bytes, rank = least[0]
        dealt[rank].append(name)
        heapq.heapreplace(least, (num_bytes + files[name].num_bytes, rank))
    return dealt
