"""What a source does not want of what it could use (`data.sources.SOURCE.raw.filters`), sample by sample.

`unwanted_cause` judges a sample alone, where it is rendered; `duplicates.py` compares it with those before it.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from megatron_vl.config.data import FilterConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.images import read_size
from megatron_vl.data.sample import IMAGE_MARK

MAX_DIFFERING_BITS = 4  # of near images: beyond, almost all kept ones would have to be compared


def check_filters(filters: FilterConfig, field: str) -> None:
    """Raises UserError, naming the configuration's `field` and value, where one cannot be."""
    texts, images = filters.near_duplicate_texts, filters.near_duplicate_images
    least = {"min_side": 1, "max_aspect_ratio": 1, "min_characters": 1, "max_characters": 1}
    for name, bound in least.items():
        value = getattr(filters, name)
        if value is not None and value < bound:
            raise UserError(f"{field}.{name}={value} must be at least {bound}, or null")
    if texts is not None and not 0.5 <= texts <= 1:
        raise UserError(
            f"{field}.near_duplicate_texts={texts}, a similarity, must be within 0.5 and 1, or null"
        )
    if images is not None and not 0 <= images <= MAX_DIFFERING_BITS:
        raise UserError(
            f"{field}.near_duplicate_images={images}, bits of 64 that differ, must be within 0 and "
            f"{MAX_DIFFERING_BITS}, or null"
        )
    for module in _libraries(filters):
        if find_spec(module) is None:
            raise UserError(f"{field} needs {module}: pip install 'megatron-vl[build]'")
    unknown = set(filters.languages) - set(_known_languages() if filters.languages else ())
    if unknown:
        raise UserError(
            f"{field}.languages has {', '.join(sorted(unknown))}; valid: {', '.join(_known_languages())}"
        )


def _libraries(filters: FilterConfig) -> list[str]:
    needed = {
        "py3langid": bool(filters.languages),
        "datasketch": filters.near_duplicate_texts is not None,
        "imagehash": filters.near_duplicate_images is not None,
    }
    return [module for module, is_needed in needed.items() if is_needed]


def unwanted_cause(fields: Mapping[str, Any], images: Mapping[str, bytes], filters: FilterConfig) -> str:
    """Why the sample is not wanted; empty where it is."""
    return _unwanted_image(images, filters) or _unwanted_text(text_of(fields), filters)


def text_of(fields: Mapping[str, Any]) -> str:
    """A document's text, or a conversation's messages, one a line; without image marks."""
    contents = [message["content"] for message in fields.get("messages", [])] or [fields["text"]]
    return "\n".join(contents).replace(IMAGE_MARK, "").strip()


def _unwanted_image(images: Mapping[str, bytes], filters: FilterConfig) -> str:
    for data in images.values():
        short, long = sorted(read_size(data))
        if filters.min_side is not None and short < filters.min_side:
            return "min_side"
        if filters.max_aspect_ratio is not None and long > filters.max_aspect_ratio * short:
            return "max_aspect_ratio"
    return ""


def _unwanted_text(text: str, filters: FilterConfig) -> str:
    if filters.min_characters is not None and len(text) < filters.min_characters:
        return "min_characters"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "max_characters"
    if filters.languages and _language(text) not in filters.languages:
        return "languages"
    return ""


def _language(text: str) -> str:
    import py3langid  # of the extra `build`; it loads a model

    return str(py3langid.classify(text)[0])


def _known_languages() -> list[str]:
    import py3langid

    return sorted(language for language, _ in py3langid.rank(""))
