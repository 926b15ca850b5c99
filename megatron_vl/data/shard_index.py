"""The index of one shard: what its samples weigh and where their bytes are. N samples, I images."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.image_tokens import ImageTokens

ShardArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where one file of a sample lies in its shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a sample's bytes are, and what it holds."""

    shard: str  # path or url
    shard_bytes: int  # size of the shard when it was indexed
    key: str
    text: Member  # KEY.json
    images: tuple[Member, ...]
    num_text_tokens: int
    image_sizes: NDArray[np.int32]  # [images, 2]


class ShardIndex:
    """The columns of one shard.

    keys: bytes [N], UTF-8.
    num_text_tokens: int32 [N], text and eos tokens: a sample's sequence without bos and image tokens.
    num_images: int32 [N].
    image_starts: int64 [N + 1]; sample n has the images image_starts[n] to image_starts[n + 1].
    image_sizes: int32 [I, 2], upright width and height; 0, 0 where the header is unreadable.
    text_members: int64 [N, 2]; image_members: int64 [I, 2]: offset and size in bytes.
    """

    def __init__(self, arrays: ShardArrays) -> None:
        self.keys, self.num_text_tokens = arrays["keys"], arrays["num_text_tokens"]
        self.num_images, self.image_sizes = arrays["num_images"], arrays["image_sizes"]
        self.text_members, self.image_members = arrays["text_members"], arrays["image_members"]
        self.image_starts = starts(self.num_images)

    def num_positions(self, image_tokens: ImageTokens) -> NDArray[np.int64]:
        """Positions that each sample [N] takes in a row: its sequence without the last token."""
        before = starts(image_tokens.count(self.image_sizes))
        return self.num_text_tokens + before[self.image_starts[1:]] - before[self.image_starts[:-1]]

    def locate(self, sample: int, shard: str, shard_bytes: int) -> Location:
        """Where the bytes of a sample of this shard are."""
        images = slice(self.image_starts[sample], self.image_starts[sample + 1])
        return Location(
            shard=shard,
            shard_bytes=shard_bytes,
            key=self.keys[sample].decode(errors="surrogateescape"),
            text=_member(self.text_members[sample]),
            images=tuple(_member(member) for member in self.image_members[images]),
            num_text_tokens=int(self.num_text_tokens[sample]),
            image_sizes=self.image_sizes[images],
        )


def parse_arrays(data: bytes, sha256: str, path: str, remedy: str) -> ShardIndex:
    """The columns in the bytes of an .index.npz. Raises UserError where they are not those of `sha256`."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not the one that its index.json was written with; {remedy}")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return ShardIndex(dict(arrays))


def arrays_name(shard: str) -> str:
    """The file beside a shard that holds its columns."""
    return f"{PurePosixPath(shard).stem}.index.npz"


def starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of consecutive groups begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _member(offset_and_size: NDArray[np.int64]) -> Member:
    offset, size = offset_and_size.tolist()
    return Member(offset=offset, size=size)
