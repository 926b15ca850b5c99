"""The index of a folder of shards: what samples weigh and where their bytes are, so that plans read none.

folder/index.json                 names, sizes and hashes of the shards, fingerprints of the text rule
folder/shard-000000.index.npz     one entry per sample, or per image of a sample, in the order of the shard

N samples of all shards, I their images, K shards.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.images import ImageTokens
from megatron_vl.data.text import TextRule

INDEX_NAME = "index.json"
INDEX_FORMAT = "megatron-vl-index-1"
MAX_CACHED_SHARDS = 256  # whose locations are held

ShardArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as index.json lists it. Hashes are sha256 in hex; `index_sha256` is of its .index.npz."""

    name: str
    size_bytes: int
    sha256: str
    index_sha256: str
    num_samples: int
    num_images: int
    num_text_tokens: int
    num_unreadable_images: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where one file of a sample lies in its shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a sample's bytes are."""

    shard: str  # path
    shard_bytes: int  # size of the shard when it was indexed
    key: str
    text: Member  # KEY.json
    images: tuple[Member, ...]


class SourceIndex:
    """The columns of one indexed folder that plans are made from, and where each sample lies.

    name: the source's name in the configuration.
    num_samples: N.
    num_text_tokens: int32 [N], text and eos tokens: a sample's sequence without bos and image tokens.
    num_images: int32 [N].
    image_starts: int64 [N + 1]; sample r has the images image_starts[r] to image_starts[r + 1].
    image_sizes: int32 [I, 2], upright width and height; 0, 0 where the header is unreadable.
    shard_starts: int64 [K], the first sample of each shard.
    digest: sha256 hex of all that was indexed, fingerprints included; independent of where the folder is.
    """

    def __init__(self, folder: Path, name: str, shards: list[ShardEntry], digest: str) -> None:
        """Read the shards' arrays; `open` checks first. Raises UserError where they are not as written."""
        self.folder, self.name, self.shards, self.digest = folder, name, shards, digest
        columns = [_plan_columns(_load_arrays(folder, shard)) for shard in shards]
        self.num_text_tokens, self.num_images, self.image_sizes = map(
            np.concatenate, zip(*columns, strict=True)
        )
        self.image_starts = _starts(self.num_images)
        self.shard_starts = _starts(np.array([shard.num_samples for shard in shards]))[:-1]
        self.num_samples = len(self.num_text_tokens)
        self._shard_arrays = lru_cache(maxsize=MAX_CACHED_SHARDS)(
            lambda shard: _with_starts(_load_arrays(folder, shards[shard]))
        )

    @classmethod
    def open(
        cls,
        folder: str | Path,
        text_rule: TextRule,
        *,
        name: str,
        max_image_pixels: int | None = None,
        build_command: str = "",
        verify: bool = False,
    ) -> "SourceIndex":
        """The index of `folder`, checked against its shards and the text rule; `verify` also hashes shards.

        Raises UserError: folder or index missing (names `build_command` if given), another tokenizer or chat
        template, a shard missing, empty, not indexed or changed, an image of more than `max_image_pixels`.
        """
        folder = Path(folder)
        fingerprints, shards, digest = _read_index_file(folder, name, build_command)
        _check_fingerprints(fingerprints, text_rule, folder)
        _check_shards(folder, shards, verify)
        index = cls(folder, name, shards, digest)
        if max_image_pixels is not None:
            index._check_image_sizes(max_image_pixels)
        return index

    def num_positions(self, image_tokens: ImageTokens) -> NDArray[np.int64]:
        """Positions that each sample [N] takes in a row: its sequence without the last token."""
        per_image = _starts(image_tokens.count(self.image_sizes))
        return self.num_text_tokens + per_image[self.image_starts[1:]] - per_image[self.image_starts[:-1]]

    def locate(self, row: int) -> Location:
        """Where the bytes of sample `row` are."""
        shard = int(np.searchsorted(self.shard_starts, row, side="right")) - 1
        local = row - int(self.shard_starts[shard])
        arrays, entry = self._shard_arrays(shard), self.shards[shard]
        images = range(arrays["image_starts"][local], arrays["image_starts"][local + 1])
        return Location(
            shard=str(self.folder / entry.name),
            shard_bytes=entry.size_bytes,
            key=arrays["keys"][local].decode(),
            text=_member(arrays["text_members"][local]),
            images=tuple(_member(arrays["image_members"][image]) for image in images),
        )

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        return self.locate(row).key

    def _check_image_sizes(self, max_pixels: int) -> None:
        num_pixels = self.image_sizes.astype(np.int64).prod(axis=1)
        if not (num_pixels > max_pixels).any():
            return
        image = int(num_pixels.argmax())
        row = int(np.searchsorted(self.image_starts, image, side="right")) - 1
        width, height = self.image_sizes[image]
        location = self.locate(row)
        raise UserError(
            f"image {image - int(self.image_starts[row])} of sample {location.key!r} in {location.shard} has "
            f"{width} x {height} = {num_pixels[image]} pixels; data.max_image_pixels is {max_pixels}. "
            f"Raise it, or shrink the {int((num_pixels > max_pixels).sum())} images of {self.name} beyond it"
        )


def write_index_file(folder: Path, text_rule: TextRule, shards: list[ShardEntry]) -> None:
    """Write index.json, which makes the shards' arrays an index; atomic."""
    content = {
        "format": INDEX_FORMAT,
        "fingerprints": _fingerprints(text_rule),
        "shards": [vars(shard) for shard in shards],
    }
    aside = folder / f"{INDEX_NAME}.partial"
    aside.write_text(json.dumps(content, indent=1))
    aside.replace(folder / INDEX_NAME)


def arrays_path(folder: Path, shard_name: str) -> Path:
    """Where the arrays of a shard are stored."""
    return folder / f"{Path(shard_name).stem}.index.npz"


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their names. Raises UserError where there are none."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder} holds no shards (*.tar)")
    return shards


def file_sha256(path: Path) -> str:
    """sha256 hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprints(text_rule: TextRule) -> dict[str, str]:
    return {"tokenizer": text_rule.tokenizer_fingerprint, "chat template": text_rule.template_fingerprint}


def _reindex(folder: Path) -> str:
    return f"(re)index {folder} with `python -m data_tools.index data=NAME`"


def _read_index_file(
    folder: Path, name: str, build_command: str
) -> tuple[dict[str, str], list[ShardEntry], str]:
    """Fingerprints, shards and digest."""
    if not folder.is_dir():
        remedy = (
            f"build it with `{build_command}`" if build_command else "see docs/data.md for what it must hold"
        )
        raise UserError(f"data.sources.{name}: the folder {folder} does not exist; {remedy}")
    try:
        data = (folder / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        raise UserError(f"data.sources.{name}: {folder} has no {INDEX_NAME}; {_reindex(folder)}") from None
    try:
        content = json.loads(data)
        if content["format"] != INDEX_FORMAT:
            raise UserError(f"{folder / INDEX_NAME} is not of the format {INDEX_FORMAT}; {_reindex(folder)}")
        shards = [ShardEntry(**entry) for entry in content["shards"]]
        return dict(content["fingerprints"]), shards, hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX_NAME} is damaged ({error}); {_reindex(folder)}") from error


def _load_arrays(folder: Path, shard: ShardEntry) -> ShardArrays:
    path = arrays_path(folder, shard.name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_reindex(folder)}") from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{path} is not the one that {INDEX_NAME} was written with; {_reindex(folder)}")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _plan_columns(arrays: ShardArrays) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    return arrays["num_text_tokens"], arrays["num_images"], arrays["image_sizes"]


def _with_starts(arrays: ShardArrays) -> ShardArrays:
    return arrays | {"image_starts": _starts(arrays["num_images"])}


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of consecutive groups begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _member(offset_and_size: NDArray[np.int64]) -> Member:
    offset, size = offset_and_size.tolist()
    return Member(offset=offset, size=size)


def _check_fingerprints(indexed: dict[str, str], text_rule: TextRule, folder: Path) -> None:
    for what, current in _fingerprints(text_rule).items():
        if indexed.get(what) != current:
            raise UserError(
                f"{folder} was indexed with another {what}, of fingerprint {indexed.get(what, '')[:12]}; "
                f"the configured one has {current[:12]}, so token counts would be wrong; {_reindex(folder)}"
            )


def _check_shards(folder: Path, shards: list[ShardEntry], verify: bool) -> None:
    unknown = {path.name for path in list_shards(folder)} - {shard.name for shard in shards}
    if unknown:
        raise UserError(f"shard {folder / min(unknown)} is not in {folder / INDEX_NAME}; {_reindex(folder)}")
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"shard {path} is missing; restore it, or {_reindex(folder)}")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"shard {path} is empty; its index says {shard.size_bytes} bytes: restore it")
        if size != shard.size_bytes:
            raise UserError(
                f"shard {path} differs from its index: it has {size} bytes, not {shard.size_bytes}; "
                f"restore it, or {_reindex(folder)}"
            )
        if verify and file_sha256(path) != shard.sha256:
            raise UserError(
                f"shard {path} differs from its index: its sha256 is not {shard.sha256[:12]}…; "
                f"restore it, or {_reindex(folder)}"
            )
