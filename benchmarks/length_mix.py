"""Lengths as pretraining data has them: documents of images and of text, in positions of a row.

Multimodal: captions 50 %, pages with their text 25 %, interleaved documents 15 %, tables 10 %; 1.3 images of 576 tokens
a document. Text: lognormal, with documents longer than a row.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.deal import SourceTable
from megatron_vl.data.types import MULTIMODAL, TEXT

TOKENS_PER_IMAGE, SHARD_SAMPLES = 576, 400
SHARES = (0.5, 0.25, 0.15, 0.1)
MEDIANS, SPREADS = (60, 700, 900, 500), (0.5, 0.7, 0.6, 0.6)


def lengths(modality: str, num_samples: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions and images of `num_samples` samples, [num_samples] each."""
    random = np.random.default_rng(seed)
    if modality == TEXT:
        tokens = random.lognormal(np.log(700), 1.1, size=num_samples).astype(np.int64) + 2
        return tokens, np.zeros(num_samples, dtype=np.int64)
    kind = random.choice(4, size=num_samples, p=SHARES)
    images = np.where(kind == 2, random.integers(2, 5, size=num_samples), 1)
    text = random.lognormal(np.log(np.array(MEDIANS)[kind]), np.array(SPREADS)[kind]).astype(np.int64) + 2
    return text + TOKENS_PER_IMAGE * images, images


def source(name: str, modality: str, num_samples: int) -> SourceTable:
    """A source of such samples, in memory."""
    tokens, images = lengths(modality, num_samples)
    return SourceTable(
        name=name,
        modality=modality,
        num_samples=num_samples,
        num_images=int(images.sum()),
        first_samples=np.arange(0, num_samples, SHARD_SAMPLES),
        read=lambda start, stop: (tokens[start:stop], images[start:stop]),
        digest="",
    )


SOURCES = {"pages": MULTIMODAL, "documents": TEXT}
