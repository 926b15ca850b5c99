"""Where the files of a source lie: the one face of local folders, http(s) servers and object stores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_vl.config.data import AccessConfig
from megatron_vl.config.errors import PassingError, UserError

RANGES, SHARDS = "ranges", "shards"  # ways to fetch


class StorageError(PassingError):
    """A file or folder that cannot be read. Names it and what was tried, never a credential."""


class MissingError(StorageError):
    """A file or folder that is not there."""


class Folder(Protocol):
    """The files directly in one folder. Safe to share between threads.

    Every method raises StorageError where a file cannot be read, MissingError where it is not there.
    """

    url: str  # path, or url without credentials; a file's own is f"{url}/{name}"

    @property
    def bytes_fetched(self) -> int:
        """Bytes that requests brought so far; 0 for a path."""
        ...

    def sizes(self) -> dict[str, int]:
        """Names of all files with their sizes in bytes: one listing, but over http a request for each file."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, max_bytes: int) -> bytes:
        """A whole file; one of more than `max_bytes` is refused before it is read."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        ...

    def local_path(self, name: str) -> Path:
        """The file itself, or its copy in the node's cache, fetched if need be.

        Open it at once: a copy may be evicted at any time, which does not concern those who have it open.
        Raises StorageError where the file is remote and there is no cache.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AccessRule:
    """`AccessConfig`, checked. It matters for remote folders only."""

    fetch: str
    cache: Path | None
    cache_bytes: int
    attempts: int
    timeout_seconds: float
    backoff_seconds: float

    @classmethod
    def of(cls, config: AccessConfig) -> "AccessRule":
        """Raises UserError, naming the field, where a value makes no sense."""
        if config.fetch not in (RANGES, SHARDS):
            raise UserError(f"data.access.fetch={config.fetch} must be {RANGES} or {SHARDS}")
        if config.fetch == SHARDS and config.cache is None:
            raise UserError(
                f"data.access.fetch={SHARDS} needs data.access.cache, a folder on the node's own disk"
            )
        for name in ("cache_bytes", "attempts", "timeout_seconds"):
            if getattr(config, name) <= 0:
                raise UserError(f"data.access.{name}={getattr(config, name)} must be more than 0")
        if config.backoff_seconds < 0:
            raise UserError(f"data.access.backoff_seconds={config.backoff_seconds} must be at least 0")
        cache = None if config.cache is None else Path(config.cache)
        return cls(**(vars(config) | {"cache": cache}))


DEFAULT_ACCESS = AccessRule.of(AccessConfig())
