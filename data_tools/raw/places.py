"""Where records lie: sequences of small places, kept in arrays, since there may be tens of millions."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np

T_co = TypeVar("T_co", covariant=True)


class Place(Protocol):
    """Where a record lies in its file; `str(place)` says it."""

    def read(self, path: Path, max_bytes: int) -> Any:
        """The record in the file `path`. Raises RecordError where it cannot be used."""


class Places(Sequence[T_co]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def _at(self, number: int) -> T_co:
        """Item `number`, from 0."""

    @overload
    def __getitem__(self, number: int) -> T_co: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[T_co]: ...
    def __getitem__(self, number: int | slice) -> T_co | Sequence[T_co]:
        place = range(len(self))[number]
        return [self._at(one) for one in place] if isinstance(place, range) else self._at(place)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A place in a file of `raw.file`; `file` is empty where that is the file itself."""

    file: str
    place: Place

    def read(self, root: Path, max_bytes: int) -> Any:
        """The record. Raises RecordError."""
        return self.place.read(root / self.file if self.file else root, max_bytes)

    def __str__(self) -> str:
        return f"{self.file}, {self.place}" if self.file else str(self.place)


class Drafts(Places[Draft]):
    """The places of several files, one file after the other."""

    def __init__(self, files: Iterable[tuple[str, Sequence[Place]]]) -> None:
        self._files = list(files)
        self._ends = np.cumsum([len(places) for _, places in self._files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, number: int) -> Draft:
        file = int(np.searchsorted(self._ends, number, side="right"))
        name, places = self._files[file]
        return Draft(file=name, place=places[number - (int(self._ends[file - 1]) if file else 0)])


class ItemDrafts(Places[Draft]):
    """A draft for each item of a sequence: a line of `raw.file`, or a name in it."""

    def __init__(self, items: Sequence[Any], place_of: Callable[[Any], Place]) -> None:
        self._items, self._place_of = items, place_of

    def __len__(self) -> int:
        return len(self._items)

    def _at(self, number: int) -> Draft:
        return Draft(file="", place=self._place_of(self._items[number]))
