"""Captions, interleaved documents and plain text as JSON records, in the form of docs/data.md."""

from typing import Any

from data_tools.raw.format import RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

CAPTION_FIELDS = ("caption", "text")
IMAGE_FIELDS = ("image", "image_path", "file_name")


def read_text(record: Any, system: str) -> RawSample:
    """A document without images: `text`, as the Pile, C4 and most text sets have it."""
    del system
    return RawSample(fields={"text": _document(_object(record), ("text",))}, images=[])


def read_caption(record: Any, system: str) -> RawSample:
    """One image and its caption, which follows it. Raises RecordError where either is missing."""
    del system
    fields = _object(record)
    names = [fields[name] for name in IMAGE_FIELDS if fields.get(name)]
    if len(names) != 1 or not isinstance(names[0], str):
        raise RecordError("unclear images", f"it must name one image, in {' or '.join(IMAGE_FIELDS)}")
    return RawSample(fields={"text": IMAGE_MARK + _document(fields, CAPTION_FIELDS)}, images=[names[0]])


def read_interleaved(record: Any, system: str) -> RawSample:
    """Texts and the images among them: MMC4's `text_list`, and `image_info` with `image_name` and
    `matched_text_index`, the text that the image stands before (allenai/mmc4). Texts are joined by newlines.

    Raises RecordError where an index leads to no text, or there are no texts.
    """
    del system
    fields = _object(record)
    texts, infos = fields.get("text_list"), fields.get("image_info", [])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError("no text", '"text_list" must be a list of at least one text')
    if not isinstance(infos, list):
        raise RecordError("unclear images", '"image_info" must be a list')
    before: dict[int, list[str]] = {}
    for info in infos:
        name, index = _placed_image(info, len(texts))
        before.setdefault(index, []).append(name)
    pieces = [IMAGE_MARK * len(before.get(index, [])) + _unmarked(text) for index, text in enumerate(texts)]
    images = [name for index in sorted(before) for name in before[index]]
    return RawSample(fields={"text": "\n".join(pieces)}, images=images)


def _placed_image(info: Any, num_texts: int) -> tuple[str, int]:
    name = info.get("image_name") if isinstance(info, dict) else None
    if not isinstance(name, str) or not name:
        raise RecordError("unclear images", f"an image is {info!r}; it must have an image_name")
    index = info.get("matched_text_index")
    if type(index) is not int or not 0 <= index < num_texts:
        raise RecordError(
            "unclear images", f"{name} stands before text {index!r}; there are texts 0 to {num_texts - 1}"
        )
    return name, index


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RecordError("not a record", f"it is a {type(record).__name__}; an object is needed")
    return record


def _document(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    texts = [fields[name] for name in names if fields.get(name)]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise RecordError("no text", f"it must have one text, in {' or '.join(names)}")
    return _unmarked(texts[0])


def _unmarked(text: str) -> str:
    """A text of its own has no images to stand for."""
    if IMAGE_MARK in text:
        raise RecordError(
            "images do not match the marks", f"its text holds {IMAGE_MARK}, which stands for an image"
        )
    return text
