"""A few held-out samples for people to look at."""

import base64
import io

from PIL import Image

from megatron_vl.data.images import decode_image
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.loader import ContentRule
from megatron_vl.data.sample import IMAGE_MARK, parse_sample
from megatron_vl.data.shards import ShardReader


def heldout_samples(
    indexes: list[SourceIndex], content: ContentRule, per_source: int = 3
) -> list[dict[str, str]]:
    """The first image samples of each source: source, prompt, target, and the image as the model sees it (PNG)."""
    reader = ShardReader()
    return [
        _sample(index, row, content, reader)
        for index in indexes
        for row in range(min(per_source, index.num_samples))
        if index.num_images[row]
    ]


def _sample(index: SourceIndex, row: int, content: ContentRule, reader: ShardReader) -> dict[str, str]:
    location = index.locate(row)
    data = reader.read(location, location.text)
    sample = parse_sample(data, location.key, location.shard, content.max_sample_bytes)
    image = decode_image(
        reader.read(location, location.images[0]), content.image, location.key, location.shard
    )
    if sample.messages:
        prompt, target = (message.content for message in sample.messages[:2])
    else:
        prompt, target = "", sample.text or ""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return {
        "source": index.name,
        "prompt": prompt.replace(IMAGE_MARK, "").strip(),
        "target": target.replace(IMAGE_MARK, "").strip(),
        "image_png_base64": base64.b64encode(buffer.getvalue()).decode(),
    }
