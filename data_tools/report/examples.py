"""A few samples of a source to look at: thumbnails, and how their texts begin."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_vl.config.data import DataConfig
from megatron_vl.data.images import FORMATS
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.sample import IMAGE_MARK, Sample, SampleError, parse_sample
from megatron_vl.data.shard_reader import ShardReader
from megatron_vl.data.storage.folder import AccessRule

NUM_EXAMPLES = 6
MAX_CHARACTERS = 280
THUMBNAIL = (360, 260)  # pixels, at most
THUMBNAIL_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample. `picture` is its first image as a small JPEG in base64, `trouble` what is wrong with it."""

    key: str
    shard: str
    text: str
    num_images: int
    num_text_tokens: int
    picture: str | None
    trouble: str | None


def examples(index: SourceIndex, config: DataConfig) -> list[Example]:
    """The first sample, and others at equal distances, so that many shards are seen."""
    reader = ShardReader(AccessRule.of(config.access))
    rows = np.unique(np.linspace(0, index.num_samples, NUM_EXAMPLES, endpoint=False).astype(int))
    return [_example(index, row, reader, config) for row in rows.tolist()]


def _example(index: SourceIndex, row: int, reader: ShardReader, config: DataConfig) -> Example:
    location = index.locate(row)
    text, picture, trouble = "", None, None
    try:
        data = reader.read(location, location.text)
        text = _words(parse_sample(data, location.key, location.shard, config.max_sample_bytes))
    except SampleError as error:
        trouble = f"{error.cause}: {error.detail}"
    if location.images:
        try:
            picture = _thumbnail(reader.read(location, location.images[0]), config.max_image_pixels)
        except Exception as error:  # Pillow's plugins raise many kinds on garbage
            trouble = f"the first image cannot be shown: {error}"
    return Example(
        key=location.key,
        shard=location.shard.rpartition("/")[2],
        text=text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS].rstrip()} …",
        num_images=len(location.images),
        num_text_tokens=location.num_text_tokens,
        picture=picture,
        trouble=trouble,
    )


def _words(sample: Sample) -> str:
    if sample.text is not None:
        return sample.text.replace(IMAGE_MARK, "▣")
    turns = (f"{message.role}: {message.content}" for message in sample.messages)
    return "\n".join(turns).replace(IMAGE_MARK, "▣")


def _thumbnail(data: bytes, max_pixels: int) -> str:
    """Base64 of a JPEG. Raises ValueError beyond `max_pixels`, and what Pillow raises."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels; data.max_image_pixels is {max_pixels}")
        small = image.convert("RGBA")
    small.thumbnail(THUMBNAIL)
    on_white = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    file = io.BytesIO()
    on_white.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
