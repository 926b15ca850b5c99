"""What records come in: a .json or .jsonl file, or a folder of images with captions; whatever they mean."""

from collections.abc import Callable, Sequence
from typing import Any

from data_tools.raw.folder import digest_of, locate_images, read_pair
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.records import Span, locate_records, read_record
from megatron_vl.data.index import file_sha256

Meaning = Callable[[Any, str], RawSample]  # a record and the source's system message -> what it says


def records_format(meaning: Meaning, *, of_folder: bool = False) -> Format:
    """The format of records that `meaning` understands."""

    def read(material: Material, draft: Span | str) -> Sequence[RawSample]:
        record = _read(material, draft)
        identity = record.get("id") if isinstance(record, dict) else None
        name = "" if identity is None else f"id {identity!r}"
        try:
            sample = meaning(record, material.raw.system)
        except RecordError as error:
            raise RecordError(error.cause, error.detail, name) from error
        return [RawSample(fields=sample.fields, images=sample.images, name=name)]

    return Format(drafts=_drafts, read=read, digest=_digest, of_folder=of_folder)


def _read(material: Material, draft: Span | str) -> Any:
    if isinstance(draft, Span):
        return read_record(material.file, draft, material.max_sample_bytes)
    return read_pair(material.file, draft, material.max_sample_bytes)


def _drafts(material: Material, field: str) -> Sequence[Span | str]:
    if material.file.is_dir():
        return locate_images(material.file, field)
    return locate_records(material.file, field, material.max_sample_bytes)


def _digest(material: Material) -> str:
    """Nothing for a file that is not there: that is told when its part is decided."""
    if material.file.is_dir():
        return digest_of(material.file)
    return file_sha256(material.file) if material.file.is_file() else ""
