"""Shuffles that never change: not with the machine, not with a library's version.

numpy's generators may change their streams between versions, so a plan made with them could not be resumed
after an upgrade. Here every order comes from integer mixing alone.
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

# The increment and multipliers of SplitMix64 (Steele, Lea, Flood 2014).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def stream_key(*labels: int | str) -> int:
    """A 64-bit key for the random stream that the labels name, such as (seed, stage, source, epoch)."""
    text = json.dumps(labels).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_words(key: int, num: int) -> npt.NDArray[np.uint64]:
    """The first `num` outputs (uint64) of SplitMix64 started at `key`."""
    word = np.uint64(key) + np.arange(1, num + 1, dtype=np.uint64) * _INCREMENT  # wraps at 2^64, as it should
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLIERS[0]
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLIERS[1]
    return word ^ (word >> np.uint64(31))


def permutation(key: int, num: int) -> npt.NDArray[np.int64]:
    """The order of 0 … num-1 that belongs to `key`; the sort is stable, so equal words leave no choice."""
    return np.argsort(random_words(key, num), kind="stable").astype(np.int64)
