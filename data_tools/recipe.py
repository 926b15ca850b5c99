"""What a build consists of: parts, each a list of drafts and a function that makes samples of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as `ShardWriter.write` takes it: the fields of KEY.json, and image files by "0.png", …

    `index` numbers the samples that one draft gives to a folder, from 0; it is part of the key. `traits` is
    what the part's sieve judges it by.
    """

    fields: dict[str, Any]
    images: dict[str, bytes] = field(default_factory=dict)
    index: int = 0
    traits: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A draft, or a sample of one, that cannot be used: a `cause` to count by; `where` it is, what is wrong."""

    cause: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What came of a draft: the records of each folder, in the part's order, and what cannot be used.

    `filtered` has the cause for each sample that could be used and is not wanted.
    """

    records: tuple[tuple[Record, ...], ...]
    rejections: tuple[Rejection, ...] = ()
    filtered: tuple[str, ...] = ()

    @property
    def rejected_fraction(self) -> float:
        """The share of the draft's samples that cannot be used."""
        num_others = sum(map(len, self.records)) + len(self.filtered)
        return len(self.rejections) / max(num_others + len(self.rejections), 1)


def one_each(*records: Record) -> Rendered:
    """One record for every folder."""
    return Rendered(records=tuple((record,) for record in records))


class Sieve(Protocol):
    """Leaves out what is too like a sample before it. Its judgement depends on the kept samples alone."""

    def judge(self, traits: bytes) -> str:
        """Why a sample of these traits is not wanted; empty where it is, which is remembered."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Folders that are filled together: draft number i becomes sample i of each, or samples i, i-1, i-2, …

    `folders` are relative to the data's root: `<source>` or `heldout/<source>`. `render`, a function of a
    module (it runs in other processes), gives a draft's records, always the same. A share of the drafts beyond
    `max_rejected_fraction` that is rejected stops the build; of a draft with several samples, each counts in part.
    `sieve` makes the part's sieve, which sees the samples in their order. `version` differs where anything comes
    out otherwise; where it is empty, the recipe's counts.
    """

    folders: tuple[str, ...]
    drafts: Sequence[Any]
    render: Callable[[Any], Rendered]
    max_rejected_fraction: float = 0.0
    samples_per_shard: int = 250  # several shards per lane of a small run
    sieve: Callable[[], Sieve] | None = None
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A build by name.

    `version` differs where anything comes out otherwise. `parts()` decides what to build.
    `train_tokenizer(texts, path, special_tokens)` writes a tokenizer.json from texts that are not held out.
    """

    name: str
    version: str
    parts: Callable[[], list[Part]]
    train_tokenizer: Callable[[Iterable[str], Path, Sequence[str]], None]
