"""Samples that are the same as one before them, or nearly: the first is kept.

Processes that render give each sample its traits, of a few hundred bytes; the process that writes compares them,
in the order of the samples, so that the number of processes changes nothing:

16 bytes                 hash of text and images            exact_duplicates
4 x NUM_PERMUTATIONS     MinHash of the text's shingles     near_duplicate_texts
8 for each image         perceptual hash                    near_duplicate_images
"""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.raw.filters import text_of
from megatron_vl.config.data import FilterConfig
from megatron_vl.data.images import FORMATS

EXACT_BYTES = 16
NUM_PERMUTATIONS = 64  # similarities are estimated within about 0.06
SCHEME = "affine32"  # of datasketch: its hash values are 32 bits wide
SHINGLE = 8  # characters; what words are is not known in every language
HASH_BITS = 64


def finds_duplicates(filters: FilterConfig) -> bool:
    """Whether samples are compared at all."""
    return (
        filters.exact_duplicates
        or filters.near_duplicate_texts is not None
        or filters.near_duplicate_images is not None
    )


def traits_of(fields: Mapping[str, Any], images: Mapping[str, bytes], filters: FilterConfig) -> bytes:
    """What `DuplicateSieve` compares of a sample."""
    traits = b""
    if filters.exact_duplicates:
        digest = hashlib.blake2b(json.dumps(fields).encode(), digest_size=EXACT_BYTES)
        for data in images.values():
            digest.update(hashlib.sha256(data).digest())
        traits += digest.digest()
    if filters.near_duplicate_texts is not None:
        traits += _minhash(text_of(fields))
    if filters.near_duplicate_images is not None:
        traits += b"".join(_perceptual_hash(data) for data in images.values())
    return traits


class DuplicateSieve:
    """Remembers what it kept: 0.1 KB a sample for exact duplicates, 2.4 KB for near texts, 0.5 KB an image."""

    def __init__(self, filters: FilterConfig) -> None:
        self._exact: set[bytes] | None = set() if filters.exact_duplicates else None
        self._texts = _NearTexts(filters.near_duplicate_texts) if filters.near_duplicate_texts else None
        bits = filters.near_duplicate_images
        self._images = _NearImages(bits) if bits is not None else None

    def judge(self, traits: bytes) -> str:
        """Which filter finds the sample, "" for none: then it is remembered."""
        exact, rest = _cut(traits, EXACT_BYTES if self._exact is not None else 0)
        text, images = _cut(rest, 4 * NUM_PERMUTATIONS if self._texts is not None else 0)
        signature, hashes = np.frombuffer(text, "<u4"), np.frombuffer(images, ">u8").tolist()
        if self._exact is not None and exact in self._exact:
            return "exact_duplicates"
        if self._texts is not None and self._texts.has(signature):
            return "near_duplicate_texts"
        if self._images is not None and hashes and all(map(self._images.has, hashes)):
            return "near_duplicate_images"
        if self._exact is not None:
            self._exact.add(exact)
        if self._texts is not None:
            self._texts.add(signature)
        if self._images is not None:
            for one in hashes:
                self._images.add(one)
        return ""


class _NearTexts:
    """Signatures, found by bands of which one must be equal, then compared as a whole."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH  # of the extra `build`

        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
        self._kept: list[NDArray[np.uint32]] = []

    def has(self, signature: NDArray[np.uint32]) -> bool:
        candidates = [self._kept[number] for number in self._index.query(self._as_minhash(signature))]
        return any(np.mean(signature == kept) >= self._threshold for kept in candidates)

    def add(self, signature: NDArray[np.uint32]) -> None:
        self._index.insert(len(self._kept), self._as_minhash(signature))
        self._kept.append(signature)

    def _as_minhash(self, signature: NDArray[np.uint32]) -> Any:
        from datasketch import MinHash

        return MinHash(num_perm=NUM_PERMUTATIONS, hashvalues=signature, scheme=SCHEME)


class _NearImages:
    """Hashes of which at most `bits` bits differ agree in one of `bits` + 1 bands: only those are compared."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        bounds = np.linspace(0, HASH_BITS, bits + 2).astype(int).tolist()
        self._bands = [((1 << end) - (1 << start)) for start, end in pairwise(bounds)]
        self._kept: dict[int, set[int]] = defaultdict(set)  # by band, which are disjoint in a hash's bits

    def has(self, one: int) -> bool:
        return any(
            (one ^ kept).bit_count() <= self._bits
            for key in self._keys(one)
            for kept in self._kept.get(key, ())
        )

    def add(self, one: int) -> None:
        for key in self._keys(one):
            self._kept[key].add(one)

    def _keys(self, one: int) -> list[int]:
        return [(one & band) | number << HASH_BITS for number, band in enumerate(self._bands)]


def _minhash(text: str) -> bytes:
    from datasketch import MinHash

    text = " ".join(text.casefold().split())
    shingles = {text[start : start + SHINGLE].encode() for start in range(max(len(text) - SHINGLE + 1, 1))}
    signature = MinHash(num_perm=NUM_PERMUTATIONS, scheme=SCHEME)
    signature.update_batch(shingles)
    return np.asarray(signature.hashvalues, "<u4").tobytes()


def _perceptual_hash(data: bytes) -> bytes:
    from imagehash import phash

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        bits: NDArray[np.bool_] = phash(image).hash
    return np.packbits(bits).tobytes()


def _cut(data: bytes, size: int) -> tuple[bytes, bytes]:
    return data[:size], data[size:]
