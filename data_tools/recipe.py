"""What a build consists of: parts, each a list of drafts and a function that makes samples of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as `ShardWriter.write` takes it: the fields of KEY.json, and image files by "0.png", …"""

    fields: dict[str, Any]
    images: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A draft that cannot be used: a `cause` to count by; `where` it is and what is wrong there."""

    cause: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Folders that are filled together: draft number i becomes sample number i of each.

    `folders` are relative to the data's root: `<source>` or `heldout/<source>`. `render`, a function of a
    module (it runs in other processes), gives one record per folder from a draft, always the same; None for a
    folder that the draft is not for. More rejected drafts than `max_rejected_fraction` stop the build.
    """

    folders: tuple[str, ...]
    drafts: Sequence[Any]
    render: Callable[[Any], tuple[Record | None, ...] | Rejection]
    max_rejected_fraction: float = 0.0
    samples_per_shard: int = 250  # several shards per lane of a small run


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A build by name.

    `version` differs where anything comes out otherwise. `parts()` decides what to build.
    `train_tokenizer(texts, path, special_tokens)` writes a tokenizer.json from texts that are not held out;
    None where the data needs a given one.
    """

    name: str
    version: str
    parts: Callable[[], list[Part]]
    train_tokenizer: Callable[[Iterable[str], Path, Sequence[str]], None] | None
