"""Where the records of a file lie, found without holding the file: .jsonl line by line, .json as one list."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, overload

import numpy as np
from numpy.typing import NDArray

from data_tools.raw.format import RecordError
from megatron_vl.config.errors import UserError

CHUNK = 1 << 22  # bytes or characters read at once
SPACE = " \t\r\n"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where record `number` (from 0) lies in its file, in bytes."""

    number: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"record {self.number}"


class Spans(Sequence[Span]):
    """The records of a file, 16 bytes each."""

    def __init__(self, spans: Iterator[tuple[int, int]]) -> None:
        flat = np.fromiter((value for span in spans for value in span), dtype=np.int64)
        self._spans: NDArray[np.int64] = flat.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, number: int) -> Span: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Span]: ...
    def __getitem__(self, number: int | slice) -> Span | Sequence[Span]:
        place = range(len(self))[number]
        if isinstance(place, range):
            return [self[n] for n in place]
        offset, size = self._spans[place]
        return Span(number=place, offset=int(offset), size=int(size))


def locate_records(path: Path, field: str, max_bytes: int) -> Spans:
    """The records of a .json or .jsonl file.

    Raises UserError, naming the configuration's `field`, the file and the record: no such file, another
    extension, no record, no list, JSON that is broken or ends early. A broken line of a .jsonl file is left
    for `read_record`, unless it is the last and unfinished.
    """
    readers = {".json": _list_spans, ".jsonl": _line_spans}
    if path.suffix not in readers:
        raise UserError(
            f"{field} is {path}; a .json file (one list of records) or .jsonl (one a line) is needed"
        )
    try:
        spans = Spans(readers[path.suffix](path, max_bytes))
    except OSError as error:
        raise UserError(f"{field} is {path}, which cannot be read: {error.strerror}") from error
    except (_FormatError, UnicodeDecodeError) as error:
        raise UserError(f"{field} is {path}: {error}") from error
    if not len(spans):
        raise UserError(f"{field} is {path}, which holds no records")
    return spans


def read_record(path: Path, span: Span, max_bytes: int) -> Any:
    """One record, parsed. Raises RecordError where it is no JSON or longer than `max_bytes`."""
    if span.size > max_bytes:
        raise RecordError("record too large", f"{span.size} bytes; data.max_sample_bytes is {max_bytes}")
    with path.open("rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid JSON", str(error)) from error


class _FormatError(Exception):
    """What is wrong with a file as a whole, and where."""


def _line_spans(path: Path, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of every line that is not blank."""
    with path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        number, size, is_whole = 0, 0, True
        while line := file.readline(CHUNK):
            is_blank, size = not line.strip(), len(line)
            while not (is_whole := line.endswith(b"\n")) and (line := file.readline(CHUNK)):
                is_blank, size = is_blank and not line.strip(), size + len(line)
            if not is_blank:
                yield offset, size
                number += 1
            offset += size
    if not is_whole and not is_blank and size <= max_bytes:
        try:
            read_record(path, Span(number=number - 1, offset=offset - size, size=size), max_bytes)
        except RecordError as error:
            raise _FormatError(
                f"record {number - 1}, the last, is unfinished ({error.detail}): the file was cut off"
            ) from error


def _list_spans(path: Path, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of every element of the one list in the file."""
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        text = _JsonText(io.TextIOWrapper(file, encoding="utf-8", newline=""), start, max_bytes)
        text.expect("[", "no list of records, which begins with [ (one record a line is .jsonl)")
        number = 0
        is_open = text.peek() != "]" or not text.expect("]", "")
        while is_open:
            yield text.skip_value(number)
            number += 1
            is_open = text.expect(",]", f"after record {number - 1}, a comma or ] must follow") == ","
        if text.peek():
            raise _FormatError(f"after the list of {number} records there is more, at byte {text.offset}")


class _JsonText:
    """A reader's place in a text of which a chunk is held. `offset` is that place in bytes."""

    def __init__(self, file: TextIO, offset: int, max_bytes: int) -> None:
        self._file, self._max_bytes, self.offset = file, max_bytes, offset
        self._held, self._position = "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            start = self._position
            while self._position < len(self._held) and self._held[self._position] in SPACE:
                self._position += 1
            self.offset += self._position - start
            if self._position < len(self._held):
                return self._held[self._position]
            if not self._read_more(CHUNK):
                return ""

    def expect(self, characters: str, complaint: str) -> str:
        """Pass one of `characters`; which one it was."""
        found = self.peek()
        if not found:
            raise _FormatError(f"it ends at byte {self.offset}, within the list: the file was cut off")
        if found not in characters:
            raise _FormatError(f"{complaint}; at byte {self.offset} there is {found!r}")
        self._position += 1
        self.offset += 1
        return found

    def skip_value(self, number: int) -> tuple[int, int]:
        """Pass record `number`; its offset and size in bytes."""
        self.peek()
        more = CHUNK
        while True:
            try:
                _, end = self._decoder.raw_decode(self._held, self._position)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._held) - self._position > self._max_bytes:
                    where = f"record {number}, at byte {self.offset}"
                    raise _FormatError(
                        f"{where}, is no JSON, or longer than data.max_sample_bytes={self._max_bytes} ({error})"
                    ) from error
                if not self._read_more(more):
                    raise _FormatError(
                        f"record {number}, at byte {self.offset}, is no JSON, or cut off ({error})"
                    ) from error
                more *= 2
        span = self.offset, len(self._held[self._position : end].encode())
        self._position = end
        self.offset += span[1]
        return span

    def _read_more(self, num_characters: int) -> bool:
        more = self._file.read(num_characters)
        self._held, self._position = self._held[self._position :] + more, 0
        return bool(more)
