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
_FEISTEL_ROUNDS = 4


def stream_key(*labels: int | str) -> int:
    """A 64-bit key for the random stream that the labels name, such as (seed, stage, source, epoch)."""
    text = json.dumps(labels).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_words(key: int, num: int) -> npt.NDArray[np.uint64]:
    """The first `num` outputs (uint64) of SplitMix64 started at `key`."""
    steps = np.arange(1, num + 1, dtype=np.uint64) * _INCREMENT  # wraps at 2^64, as it should
    return _mix(np.uint64(key) + steps)


def permutation(key: int, num: int) -> npt.NDArray[np.int64]:
    """The order of 0 … num-1 that belongs to `key`; the sort is stable, so equal words leave no choice."""
    return np.argsort(random_words(key, num), kind="stable").astype(np.int64)


def shuffled(key: int, num: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What stands at `positions` of a shuffle of 0 … num-1 that belongs to `key`, without making the others.

    A Feistel network over the next power of four, walked until it falls below `num` (Black, Rogaway 2002: "Ciphers
    with Arbitrary Finite Domains"). Four such steps a position on average, at most.
    """
    half = max(1, (max(num - 1, 1).bit_length() + 1) // 2)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=np.bool_)
    while outside.any():
        values[outside] = _feistel(key, half, values[outside])
        outside = values >= num
    return values.astype(np.int64)


def _feistel(key: int, half: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of the numbers of 2 x `half` bits: four rounds."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for round_key in random_words(key, _FEISTEL_ROUNDS):
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << bits) | right


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function."""
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    return words ^ (words >> np.uint64(31))
