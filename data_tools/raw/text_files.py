"""The format text_files: the text files of a folder, a document each."""

from collections.abc import Sequence

from data_tools.raw.fields import unmarked
from data_tools.raw.files import files_digest, list_files, read_text
from data_tools.raw.format import Format, Material, RawSample, RecordError

SUFFIXES = (".txt", ".md", ".rst")


def text_sample(text: str) -> RawSample:
    """A document. Raises RecordError where it is blank, or holds an image mark."""
    text = unmarked(text.replace("\r\n", "\n").strip())
    if not text:
        raise RecordError("no text", "it is blank")
    return RawSample(fields={"text": text})


def _read(material: Material, draft: str) -> Sequence[RawSample]:
    return [text_sample(read_text(material.file / draft, material.max_sample_bytes))]


FORMAT = Format(
    drafts=lambda material, field: list_files(material.file, SUFFIXES, field),
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES),
    of_folder=True,
)
