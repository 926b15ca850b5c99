"""A folder of a local or network file system."""

import os
from pathlib import Path

from megatron_vl.data.storage.folder import MissingError, StorageError


class LocalFolder:
    """A `Folder` read in place."""

    bytes_fetched = 0

    def __init__(self, path: str | Path) -> None:
        self.path, self.url = Path(path), str(path)

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise unreadable(self.path, error) from error

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise unreadable(self.path / name, error) from error

    def read(self, name: str, max_bytes: int) -> bytes:
        size = self.size(name)
        check_bound(str(self.path / name), size, max_bytes)
        return self.read_range(name, 0, size)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = self.path / name
        try:
            with path.open("rb") as file:
                return read_exactly(file.fileno(), offset, size, str(path))
        except OSError as error:
            raise unreadable(path, error) from error

    def local_path(self, name: str) -> Path:
        self.size(name)  # raises where it is missing
        return self.path / name


def unreadable(path: Path, error: OSError) -> StorageError:
    """What to raise where the system refuses to read `path`."""
    kind = MissingError if isinstance(error, FileNotFoundError | NotADirectoryError) else StorageError
    return kind(f"{path} cannot be read: {error.strerror}")


def check_bound(url: str, size: int, max_bytes: int) -> None:
    """Raise StorageError where a file is larger than its reader takes."""
    if size > max_bytes:
        raise StorageError(f"{url} has {size} bytes, more than the {max_bytes} that such a file may have")


def read_exactly(descriptor: int, offset: int, size: int, path: str) -> bytes:
    """`size` bytes of an open file. Raises StorageError where it ends before; OSError."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # one call gives at most 2 GiB
    if len(data) != size:
        raise StorageError(f"{path} ends before byte {offset + size}: it was changed")
    return data
