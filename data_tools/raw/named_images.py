"""Folders of images that are described by more than one text, or by their names alone."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_tools.raw.fields import unmarked
from data_tools.raw.files import files_digest, list_files, read_text
from data_tools.raw.format import Format, Material, RawSample, RecordError
from megatron_vl.data.sample import IMAGE_FORMATS, IMAGE_MARK

SUFFIXES = tuple(f".{name}" for name in IMAGE_FORMATS)
CAPTIONS = ".txt"
CHINESE = "zh_CN.utf8="  # Tux Paint's translations: LOCALE.utf8=TEXT


def _stamps(material: Material, field: str) -> Sequence[str]:
    """Mirrored and coloured variants have no text of their own, and are left out."""
    texts = set(list_files(material.file, (CAPTIONS,), field))
    names = list_files(material.file, SUFFIXES, field)
    return [name for name in names if str(PurePosixPath(name).with_suffix(CAPTIONS)) in texts]


def _read_stamp(material: Material, draft: str) -> Sequence[RawSample]:
    """The image with its English caption, the text's first line, and again with its Chinese one where there is one."""
    path = (material.file / draft).with_suffix(CAPTIONS)
    lines = read_text(path, material.max_sample_bytes).splitlines()
    chinese = [line.removeprefix(CHINESE) for line in lines if line.startswith(CHINESE)]
    captions = [caption.strip() for caption in (*lines[:1], *chinese[:1]) if caption.strip()]
    if not captions:
        raise RecordError("no text", f"{path} has no caption")
    return [_sample(draft, caption) for caption in captions]


def _read_name(material: Material, draft: str) -> Sequence[RawSample]:
    """people/head2.png is of "people: head"."""
    path = PurePosixPath(draft)
    words = re.sub(r"[\W_\d]+", " ", path.stem).strip()
    folders = ", ".join(part.replace("_", " ") for part in path.parent.parts)
    if not words:
        raise RecordError("no text", "its name has no word")
    return [_sample(draft, f"{folders}: {words}" if folders else words)]


def _sample(image: str, caption: str) -> RawSample:
    return RawSample(fields={"text": IMAGE_MARK + unmarked(caption)}, images=[image])


STAMPS = Format(
    drafts=_stamps,
    read=_read_stamp,
    digest=lambda material: files_digest(material.file, (CAPTIONS,), SUFFIXES),
    of_folder=True,
)
NAMED_IMAGES = Format(
    drafts=lambda material, field: list_files(material.file, SUFFIXES, field),
    read=_read_name,
    digest=lambda material: files_digest(material.file, (), SUFFIXES),
    of_folder=True,
)
