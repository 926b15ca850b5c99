"""What a kind of remote storage must be able to do, once and without retries; `remote.py` does the rest."""

from dataclasses import dataclass
from typing import Protocol

PASSING_STATUS = (408, 425, 429)  # of HTTP, and 500 or more: another attempt may succeed


@dataclass(frozen=True, kw_only=True)
class Stat:
    """Size of a file in bytes, and what changes with its content ("" where the server tells nothing)."""

    size: int
    version: str


class Failure(Exception):
    """A request failed; the message is for people. `passing`: another attempt may succeed."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class Store(Protocol):
    """The files of one folder. Coroutines of fsspec's loop; they raise FileNotFoundError, or what `explain` knows."""

    errors: tuple[type[Exception], ...]  # that requests end with

    async def list(self) -> dict[str, int | None]:
        """Names of all files, with their sizes where the listing tells them."""
        ...

    async def stat(self, name: str) -> Stat: ...

    async def fetch(self, name: str, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset`, or fewer where the answer was cut off."""
        ...

    def explain(self, error: Exception) -> Failure:
        """One of `errors` in words, without credentials."""
        ...


def is_passing(status: int) -> bool:
    """Whether a request that was answered with this status of HTTP is worth another attempt."""
    return status in PASSING_STATUS or status >= 500
