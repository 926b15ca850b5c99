"""What a benchmark asks: one value for every format, made by the readers and scored by everything else."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.sample import Sample

# Told how much is done of this rank's share of the items, and of how much; in no particular unit.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An encoded image: in a file of its own (`path`) or as bytes that the benchmark's file holds (`data`)."""

    name: str  # for messages
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Its bytes. Raises OSError."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise ValueError(f"{self.name} has neither path nor data")
        return self.path.read_bytes()


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `prompt` is a document, or a conversation that ends with the user's message; each of its
    image marks stands for one of `images`, in order.

    `options` are the answers to compare and `correct` is the index of the right one; `references` are the texts
    that a generated answer is compared with. A text whose bits are counted is a document without either.
    """

    key: str
    prompt: Sample
    images: tuple[ImageFile, ...] = ()
    options: tuple[str, ...] = ()
    correct: int | None = None
    references: tuple[str, ...] = ()
    category: str = ""  # results are also given by category
