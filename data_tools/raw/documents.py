"""Captions, interleaved documents and plain text as records, in the form of docs/data.md."""

import hashlib
from typing import Any

from data_tools.raw.fields import image_of, one_image, one_text, record_fields, unmarked
from data_tools.raw.format import RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

CAPTION_FIELDS = ("caption", "text", "blip_caption")


def read_text(record: Any, system: str) -> RawSample:
    """A document without images: `text`, as the Pile, C4 and most text sets have it."""
    del system
    return RawSample(fields={"text": one_text(record_fields(record), ("text",))})


def read_caption(record: Any, system: str) -> RawSample:
    """One image and its caption, which follows it. Raises RecordError where either is missing.

    The caption is the record's, or that of its one annotation, as COCO has it.
    """
    del system
    fields = record_fields(record)
    told = record_fields(fields["annotations"][0]) if fields.get("annotations") else fields
    text = one_text(told, CAPTION_FIELDS).strip()
    return RawSample(fields={"text": IMAGE_MARK + text}, images=[one_image(fields)])


def read_interleaved(record: Any, system: str) -> RawSample:
    """Texts and the images among them, joined by newlines: MMC4's records, or those of OBELICS.

    MMC4 (allenai/mmc4) has `text_list`, and `image_info` with `image_name` and `matched_text_index`, the text that
    the image stands before. OBELICS (huggingface/OBELICS) has `texts` and `images` of one length: at each place
    there is one of them, and null in the other. Raises RecordError where the record is neither.
    """
    del system
    fields = record_fields(record)
    return _obelics(fields) if "texts" in fields else _mmc4(fields)


def image_file(url: str) -> str:
    """The name under which the image of an address is expected."""
    return f"{hashlib.sha256(url.encode(errors='surrogatepass')).hexdigest()}.jpg"


def _obelics(fields: dict[str, Any]) -> RawSample:
    texts, images = fields["texts"], fields.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise RecordError("no text", '"texts" and "images" must be lists of one length')
    pieces: list[str] = []
    used: list[str | bytes] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None) or not isinstance(text, str | None):
            raise RecordError("unclear images", f"at place {place} there must be a text or an image")
        if image is not None:
            found = image_of(image)
            is_address = isinstance(found, str) and found.startswith(("http://", "https://"))
            used.append(image_file(str(found)) if is_address else found)
        pieces.append(IMAGE_MARK if text is None else unmarked(text))
    return RawSample(fields={"text": "\n".join(pieces)}, images=used)


def _mmc4(fields: dict[str, Any]) -> RawSample:
    texts, infos = fields.get("text_list"), fields.get("image_info", [])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError("no text", '"text_list" must be a list of at least one text')
    if not isinstance(infos, list):
        raise RecordError("unclear images", '"image_info" must be a list')
    before: dict[int, list[str]] = {}
    for info in infos:
        name, index = _placed_image(info, len(texts))
        before.setdefault(index, []).append(name)
    pieces = [IMAGE_MARK * len(before.get(index, [])) + unmarked(text) for index, text in enumerate(texts)]
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
