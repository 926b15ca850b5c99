"""The format notebooks: Jupyter notebooks of a folder, with the figures that are in them.

A figure belongs to the code since the figure before: that of its own cell and of the cells before it.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.raw.files import files_digest, list_files, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.web_code.code import code_sample

SUFFIXES = (".ipynb",)
IMAGE_TYPES = ("image/png", "image/jpeg")


def _drafts(material: Material, field: str) -> Sequence[str]:
    return list_files(material.file, SUFFIXES, field)


def _read(material: Material, draft: str) -> Sequence[RawSample | RecordError]:
    data = read_file(material.file / draft, material.max_sample_bytes)
    try:
        segments = list(_segments(json.loads(data)))
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise RecordError("not a notebook", f"{type(error).__name__}: {error}") from error
    if not segments:
        raise RecordError("no image", "no output of its code is one; it may be stored without them")
    samples: list[RawSample | RecordError] = []
    for number, images, code in segments:
        try:
            samples.append(code_sample(images, code))
        except RecordError as error:
            samples.append(RecordError(error.cause, error.detail, f"cell {number}"))
    return samples


def _segments(notebook: Any) -> Iterator[tuple[int, list[bytes], str]]:
    """For each cell with figures its number, they, and their code. Raises what a notebook of another form causes."""
    code: list[str] = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = _text(cell["source"]).strip("\n")
        if source.strip():
            code.append(source)
        if images := list(_images(cell["outputs"])):
            yield number, images, "\n\n".join(code)
            code = []


def _images(outputs: Any) -> Iterator[bytes]:
    for output in outputs:
        data = output.get("data", {})
        kind = next((kind for kind in IMAGE_TYPES if kind in data), None)
        if kind is not None:
            try:
                yield base64.b64decode(_text(data[kind]))
            except binascii.Error as error:
                raise ValueError(f"an image is no base64: {error}") from error


def _text(value: Any) -> str:
    """Notebooks hold texts whole, or as lists of lines."""
    text = value if isinstance(value, str) else "".join(value)
    return str(text)


FORMAT = Format(
    drafts=_drafts,
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES),
    of_folder=True,
)
