"""The format captions: records, or a folder of images with their captions in .txt files of the same names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.raw.containers import names_in, read_draft, records_digest, records_format
from data_tools.raw.documents import read_caption
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.joined import locate_annotations
from data_tools.raw.places import Draft, ItemDrafts
from megatron_vl.data.sample import IMAGE_FORMATS
from megatron_vl.data.shard_table import file_sha256

CAPTION_SUFFIX = ".txt"
IMAGE_SUFFIXES = tuple(f".{name}" for name in IMAGE_FORMATS)
RECORDS = records_format(read_caption, locate_in_object=locate_annotations)


@dataclass(frozen=True)
class Pair:
    """An image of a folder, and its caption beside it."""

    name: str

    def __str__(self) -> str:
        return self.name

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """As a record, from the folder `path`.

        Raises RecordError where the .txt is missing, larger than `max_bytes` or no UTF-8.
        """
        text = (path / self.name).with_suffix(CAPTION_SUFFIX)
        try:
            size = text.stat().st_size
            if size > max_bytes:
                raise RecordError(
                    "sample too large", f"{text} has {size} bytes; data.max_sample_bytes is {max_bytes}"
                )
            return {"image": self.name, "caption": text.read_text(encoding="utf-8-sig")}
        except OSError as error:
            raise RecordError("no text", f"{text} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecordError("no text", f"{text} is no UTF-8: {error}") from error


def _pairs(material: Material) -> list[str]:
    """The images of a folder of images; a folder of tars holds records, and one whose images lie elsewhere does."""
    folder = material.file
    if not folder.is_dir() or material.raw.images or any(folder.rglob("*.tar")):
        return []
    return names_in(folder, IMAGE_SUFFIXES)


def _drafts(material: Material, field: str) -> Sequence[Draft]:
    names = _pairs(material)
    return ItemDrafts(names, Pair) if names else RECORDS.drafts(material, field)


def _read(material: Material, draft: Draft) -> Sequence[RawSample]:
    return read_draft(material, draft, read_caption)


def _digest(material: Material) -> str:
    """By the names of images, and what their captions say."""
    names = _pairs(material)
    if not names:
        return records_digest(material)
    digest = hashlib.sha256()
    for name in [*names, *names_in(material.file, [CAPTION_SUFFIX])]:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        if name.endswith(CAPTION_SUFFIX):
            digest.update(bytes.fromhex(file_sha256(material.file / name)))
    return digest.hexdigest()


FORMAT = Format(drafts=_drafts, read=_read, digest=_digest)
