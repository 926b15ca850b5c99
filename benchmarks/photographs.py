"""The samples that loaders are compared on: photographs with captions, the same on every machine.

scikit-image's photographs, cut and scaled to the sizes that web data has, with a camera's noise; one in twenty is a
PNG, the others are JPEGs of quality 90. Captions are words of scikit-image's documentation.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as skimage_data
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vl.data.shards import ShardWriter

CACHE = Path(__file__).parent / ".cache"
NUM_SAMPLES, SAMPLES_PER_SHARD = 320, 80
SIZES = [(640, 480)] * 12 + [(480, 640)] * 3 + [(500, 375)] * 3 + [(1024, 768)] * 2  # width, height
PHOTOGRAPHS = ["astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina"]
WORDS_PER_CAPTION = 60
BOS, EOS, IMAGE = "<bos>", "<eos>", "<image_placeholder>"


def samples_folder() -> Path:
    """A folder with `shards` (ours, and webdataset's) and `tokenizer.json`, made on first use."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / f"samples-{version}"
    if folder.exists():
        return folder
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    with ShardWriter(aside / "shards", max_samples=SAMPLES_PER_SHARD) as writer:
        captions = []
        for number, (extension, image, caption) in enumerate(samples()):
            captions.append(caption)
            writer.write(f"photo-{number:05d}", {"text": f"<image>{caption}"}, {f"0.{extension}": image})
    _train_tokenizer(captions).save(str(aside / "tokenizer.json"))
    aside.rename(folder)
    return folder


def samples() -> Iterator[tuple[str, bytes, str]]:
    """File extension, image file and caption of each sample."""
    photographs = [Image.fromarray(getattr(skimage_data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    words = " ".join(getattr(skimage_data, name).__doc__ for name in PHOTOGRAPHS).split()
    random = np.random.default_rng(0)
    for number in range(NUM_SAMPLES):
        image = _cut(photographs[number % len(photographs)], SIZES[number % len(SIZES)], random)
        is_png = number % 20 == 9
        file = io.BytesIO()
        image.save(file, "PNG" if is_png else "JPEG", **({} if is_png else {"quality": 90}))
        caption = " ".join(random.choice(words, WORDS_PER_CAPTION))
        yield "png" if is_png else "jpg", file.getvalue(), caption


def _cut(photograph: Image.Image, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A random part of the right shape, at least half as wide or high, as a camera of that size would give it."""
    scale = random.uniform(0.5, 1) * min(
        have / want for have, want in zip(photograph.size, size, strict=True)
    )
    width, height = (int(side * scale) for side in size)
    left = int(random.integers(photograph.width - width + 1))
    top = int(random.integers(photograph.height - height + 1))
    part = photograph.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(part) + noise).clip(0, 255).astype(np.uint8))


def _train_tokenizer(captions: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, IMAGE)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
