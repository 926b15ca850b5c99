"""The format text_files: the text files of a folder, a document each."""

from collections.abc import Sequence

from data_tools.raw.files import files_digest, list_files, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

SUFFIXES = (".txt", ".md", ".rst")


def text_sample(data: bytes) -> RawSample:
    """A document of UTF-8. Raises RecordError where it is none, or holds an image mark."""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise RecordError("no text", f"no UTF-8: {error}") from error
    if not text:
        raise RecordError("no text", "it is blank")
    if IMAGE_MARK in text:
        raise RecordError("images do not match the marks", f"its text holds {IMAGE_MARK}")
    return RawSample(fields={"text": text})


def _read(material: Material, draft: str) -> Sequence[RawSample]:
    return [text_sample(read_file(material.file / draft, material.max_sample_bytes))]


FORMAT = Format(
    drafts=lambda material, field: list_files(material.file, SUFFIXES, field),
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES),
    of_folder=True,
)
