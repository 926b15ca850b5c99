"""A few held-out samples for people to look at, with what the model says about them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from megatron_vl.data.images import ImageRule, decode_image
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.loader import ContentRule
from megatron_vl.data.sample import IMAGE_MARK, Sample, SampleError, parse_sample
from megatron_vl.data.shard_reader import ShardReader
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import ImageFile, Item

MAX_NEW_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A question to the model, and what the sample says: texts without image marks."""

    item: Item
    source: str
    prompt: str
    target: str


def answered_samples(
    indexes: Sequence[SourceIndex], content: ContentRule, evaluator: Evaluator, per_source: int = 3
) -> list[dict[str, str]]:
    """The first image samples of each source, of those whose images decode: source, prompt, target, the model's greedy
    answer, and the image as the model sees it (PNG). Collective over the world."""
    reader = ShardReader(indexes[0].access) if indexes else ShardReader()
    first = [
        _shown(index, row, content, reader)
        for index in indexes
        for row in range(min(per_source, index.num_samples))
        if index.locate(row).images
    ]
    shown = [one for one in first if _decodes(one, content.image)]
    room = evaluator.sequence_length - max((_num_positions(one, content) for one in shown), default=0)
    if not shown or room < 1:
        return []
    answers = evaluator.generate([one.item for one in shown], min(MAX_NEW_TOKENS, room))
    return [_row(one, answer, content.image) for one, answer in zip(shown, answers, strict=True)]


def _shown(index: SourceIndex, row: int, content: ContentRule, reader: ShardReader) -> Shown:
    location = index.locate(row)
    data = reader.read(location, location.text)
    sample = parse_sample(data, location.key, location.shard, content.max_sample_bytes)
    images = tuple(
        ImageFile(name=location.key, data=reader.read(location, image)) for image in location.images
    )
    asked, target = _ask(sample)
    text = asked.text if asked.text is not None else asked.messages[-1].content
    return Shown(
        item=Item(key=location.key, prompt=asked, images=images[: asked.num_images]),
        source=index.name,
        prompt=_without_marks(text),
        target=_without_marks(target),
    )


def _decodes(shown: Shown, rule: ImageRule) -> bool:
    try:
        for image in shown.item.images:
            decode_image(image.read(), rule, shown.item.key, shown.source)
    except SampleError:  # training masks such a sample
        return False
    return True


def _ask(sample: Sample) -> tuple[Sample, str]:
    """A prompt and what should follow: a conversation's first question, a document up to its first image."""
    if sample.messages:
        first = next(n for n, message in enumerate(sample.messages) if message.role == "assistant")
        return replace(sample, messages=sample.messages[:first]), sample.messages[first].content
    text = sample.text or ""
    end = text.index(IMAGE_MARK) + len(IMAGE_MARK)
    return Sample(text=text[:end], source=sample.source), text[end:]


def _num_positions(shown: Shown, content: ContentRule) -> int:
    per_image = content.image_tokens.tokens_per_image
    return len(content.text.encode_prompt(shown.item.prompt, [per_image] * len(shown.item.images)))


def _row(shown: Shown, answer: str, rule: ImageRule) -> dict[str, str]:
    (image, *_) = shown.item.images
    pixels = decode_image(image.read(), rule, shown.item.key, shown.source)
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="PNG")
    return {
        "source": shown.source,
        "prompt": shown.prompt,
        "target": shown.target,
        "answer": answer,
        "image_png_base64": base64.b64encode(buffer.getvalue()).decode(),
    }


def _without_marks(text: str) -> str:
    return text.replace(IMAGE_MARK, "").strip()
