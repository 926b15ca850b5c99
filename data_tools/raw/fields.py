"""What is common to the fields of records: one text, one image or several, each under the names in use."""

from collections.abc import Sequence
from typing import Any

from data_tools.raw.format import RecordError
from megatron_vl.data.sample import IMAGE_MARK

# The last ones: columns of bytes, as img2dataset's parquet has them.
IMAGE_FIELDS = ("image", "image_path", "file_name", "filename", "imgname", "jpg", "png", "webp")


def record_fields(record: Any) -> dict[str, Any]:
    """Raises RecordError where the record is no object."""
    if not isinstance(record, dict):
        raise RecordError("not a record", f"it is a {type(record).__name__}; an object is needed")
    return record


def image_of(value: Any) -> str | bytes:
    """A file's name, or an image's bytes: themselves, or as Hugging Face's datasets has them, in an object with
    `bytes` or `path`. Raises RecordError.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        shown = repr(value)
        raise RecordError(
            "unclear images", f"an image is {shown[:80]}; file names are needed, or images' bytes"
        )
    return value


def one_image(fields: dict[str, Any]) -> str | bytes:
    """The record's image. Raises RecordError where it has none or several."""
    found = [fields[name] for name in IMAGE_FIELDS if fields.get(name)]
    if len(found) != 1 or isinstance(found[0], list):
        raise RecordError("unclear images", f"it must name one image, in {' or '.join(IMAGE_FIELDS)}")
    return image_of(found[0])


def one_text(fields: dict[str, Any], names: Sequence[str]) -> str:
    """The record's text, under one of `names`. Raises RecordError where there is none, or several."""
    texts = [fields[name] for name in names if fields.get(name)]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise RecordError("no text", f"it must have one text, in {' or '.join(names)}")
    return unmarked(texts[0])


def unmarked(text: str) -> str:
    """A text of its own, without images to stand for. Raises RecordError where it has an image mark."""
    if IMAGE_MARK in text:
        raise RecordError(
            "images do not match the marks", f"its text holds {IMAGE_MARK}, which stands for an image"
        )
    return text
