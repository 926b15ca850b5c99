"""The format man_pages: manual pages (.gz) of a folder as plain text, a document each."""

import gzip
import io
import zlib
from collections.abc import Sequence

from data_tools.raw.files import files_digest, list_files, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.render.pandoc import convert
from data_tools.raw.text_files import text_sample

SUFFIXES = (".gz",)


def _read(material: Material, draft: str) -> Sequence[RawSample]:
    packed = read_file(material.file / draft, material.max_sample_bytes)
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(material.max_sample_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError("cannot be read", str(error)) from error
    if len(data) > material.max_sample_bytes:
        raise RecordError("sample too large", "unpacked, it is larger than data.max_sample_bytes")
    return [text_sample(convert(data, "man", "plain"))]


FORMAT = Format(
    drafts=lambda material, field: list_files(material.file, SUFFIXES, field),
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES),
    of_folder=True,
)
