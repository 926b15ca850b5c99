"""A tiny tokenizer, pictures and shards for tests of data."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vl.data.shards import ShardWriter
from megatron_vl.data.text import TextRule

Samples = dict[str, tuple[dict[str, Any], dict[str, bytes]]]  # key: fields of KEY.json, images

BOS, EOS, IMAGE = "<bos>", "<eos>", "<image_placeholder>"
TRAINING_TEXT = (
    "User: what is in the picture?\n\nAssistant: the picture shows a red bar, a blue line and words. 图片"
)


def write_tokenizer(path: Path, text: str = TRAINING_TEXT, vocab_size: int = 330) -> Path:
    """A byte-level BPE: every character is in it, common words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, IMAGE)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.save(str(path))
    return path


def text_rule(tokenizer: Path, **changes: str) -> TextRule:
    """The rule for a tokenizer of `write_tokenizer`."""
    settings = {"bos_token": BOS, "eos_token": EOS, "image_token": IMAGE} | changes
    return TextRule(tokenizer, **settings)


def picture(width: int = 20, height: int = 12, *, seed: int = 0, file_format: str = "PNG") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=file_format)
    return file.getvalue()


def write_source(folder: Path, samples: Samples, **limits: int) -> None:
    """Shards of samples."""
    with ShardWriter(folder, **limits) as writer:
        for key, (fields, images) in samples.items():
            writer.write(key, fields, images)


def mixed_samples(count: int = 7) -> Samples:
    """Sample i has i % 3 images; sample 4 has eleven, whose names sort otherwise than their numbers."""
    samples: Samples = {}
    for i in range(count):
        number = i % 3 if i != 4 else 11
        images = {f"{n}.png": picture(20 + i, 12 + n, seed=n) for n in range(number)}
        samples[f"part/k{i}"] = ({"text": f"words {i}" * (i + 1) + "<image>" * number}, images)
    samples["chat"] = (
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a bar"}]},
        {"0.jpg": picture(33, 44, file_format="JPEG")},
    )
    return samples
