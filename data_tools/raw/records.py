"""Where the records of a file lie, found without holding the file: .jsonl line by line, .json as one list."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.raw import json_text
from data_tools.raw.format import RecordError
from data_tools.raw.json_text import BOM, FormatError, JsonText
from data_tools.raw.places import Places
from megatron_vl.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where record `number` (from 0) lies in its file, in bytes."""

    number: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"record {self.number}"

    def read(self, path: Path, max_bytes: int) -> Any:
        """The record, parsed. Raises RecordError where it is no JSON or longer than `max_bytes`."""
        try:
            return json.loads(self.read_bytes(path, max_bytes))
        except (ValueError, RecursionError) as error:
            raise RecordError("invalid JSON", str(error)) from error

    def read_bytes(self, path: Path, max_bytes: int) -> bytes:
        """What is there. Raises RecordError where it is more than `max_bytes`."""
        if self.size > max_bytes:
            raise RecordError("record too large", f"{self.size} bytes; data.max_sample_bytes is {max_bytes}")
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Spans(Places[Span]):
    """The records of a file, 16 bytes each."""

    def __init__(self, spans: Iterator[tuple[int, int]]) -> None:
        flat = np.fromiter((value for span in spans for value in span), dtype=np.int64)
        self._spans: NDArray[np.int64] = flat.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def _at(self, number: int) -> Span:
        offset, size = self._spans[number].tolist()
        return Span(number=number, offset=offset, size=size)


def locate_records(path: Path, field: str, max_bytes: int) -> Spans:
    """The records of a .json or .jsonl file.

    Raises UserError, naming the configuration's `field`, the file and the record: no such file, another
    extension, no record, no list, JSON that is broken or ends early. A broken line of a .jsonl file is left
    for `Span.read`, unless it is the last and unfinished.
    """
    if path.suffix == ".json":
        return _spans(_list_spans(path, max_bytes), path, field)
    if path.suffix == ".jsonl":
        return _spans(_record_line_spans(path, max_bytes), path, field)
    raise UserError(f"{field} is {path}; a .json file (one list of records) or .jsonl (one a line) is needed")


def locate_lines(path: Path, field: str) -> Spans:
    """The lines of a file that are not blank. Raises UserError, naming `field`, where it has none."""
    return _spans(_line_spans(path), path, field)


def _spans(found: Iterator[tuple[int, int]], path: Path, field: str) -> Spans:
    try:
        spans = Spans(found)
    except OSError as error:
        raise UserError(f"{field} is {path}, which cannot be read: {error.strerror}") from error
    except (FormatError, UnicodeDecodeError) as error:
        raise UserError(f"{field} is {path}: {error}") from error
    if not len(spans):
        raise UserError(f"{field} is {path}, which holds no records")
    return spans


def _record_line_spans(path: Path, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of every line that is not blank, the last of which must be whole."""
    number, offset, size = -1, 0, 0
    for offset, size in _line_spans(path):
        yield offset, size
        number += 1
    if number < 0 or size > max_bytes:
        return
    try:
        Span(number=number, offset=offset, size=size).read(path, max_bytes)
    except RecordError as error:
        if not _ends_with_newline(path):
            raise FormatError(
                f"record {number}, the last, is unfinished ({error.detail}): the file was cut off"
            ) from error


def _line_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of every line that is not blank."""
    with path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        while line := file.readline(json_text.CHUNK):
            is_blank, size = not line.strip(), len(line)
            while not line.endswith(b"\n") and (line := file.readline(json_text.CHUNK)):
                is_blank, size = is_blank and not line.strip(), size + len(line)
            if not is_blank:
                yield offset, size
            offset += size


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _list_spans(path: Path, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of every element of the one list in the file."""
    with JsonText(path, max_bytes) as text:
        if text.peek() not in ("[", ""):
            text.expect("[", "no list of records, which begins with [ (one record a line is .jsonl)")
        number = 0
        for value in text.elements("record"):
            yield value.offset, value.size
            number += 1
        text.expect_end(f"the list of {number} records")
