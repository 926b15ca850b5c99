"""A benchmark's files as rows.

Sizes are checked before anything is read. Whatever is wrong is one UserError that names file, row and field.
"""

import ast
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK

MAX_FILE_BYTES = 2 << 30
MAX_JSON_BYTES = 256 << 20  # of a file that is one JSON value: its objects take several times its size
MAX_CELL_BYTES = 128 << 20  # a line of JSON, a cell of a table: MAX_IMAGE_BYTES in base64, and text
MAX_LIST_CHARACTERS = 1 << 16  # of a list written out in a string
PARQUET_ROWS_AT_ONCE = 64

# What stands in a benchmark's own text where it happens to spell the image mark.
_SPELLED_OUT_MARK = "< image >"


@dataclass(frozen=True)
class Row:
    """One row, line or entry. `place` names its file and itself, for messages; `number` counts from 1."""

    fields: Mapping[str, Any]
    path: Path
    number: int

    @property
    def place(self) -> str:
        return f"{self.path}, row {self.number}"

    def error(self, message: str) -> UserError:
        """The error to raise about this row."""
        return UserError(f"{self.place}: {message}")

    def raw(self, name: str) -> Any:
        """A field as the file has it. Raises UserError where it is absent."""
        if name not in self.fields:
            raise self.error(f"no field {name!r}; it has {', '.join(map(str, self.fields))}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """A text, stripped. Raises UserError where it is absent, none or blank."""
        text = self.optional_text(name)
        if name not in self.fields or not text:
            raise self.error(f"{name} is {self.raw(name)!r}; it must be a text that is not blank")
        return text

    def optional_text(self, name: str) -> str:
        """A text, stripped; a number as text; "" where it is absent, null or pandas' word for that."""
        value = self.fields.get(name)
        if value is None or value == "nan":
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"{name} is a {type(value).__name__}; it must be a text")
        return self._clean(str(value), name).strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts: a list, or one that is written out in a string as JSON or as Python.

        Raises UserError where it is neither, empty, or holds anything but texts and numbers.
        """
        value = self.raw(name)
        values = self._written_list(value, name) if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            raise self.error(f"{name} is {str(value)[:80]!r}; it must be a list of at least one text")
        if not all(isinstance(text, str | int | float) for text in values):
            raise self.error(f"{name} is {str(value)[:80]!r}; it must hold nothing but texts")
        return tuple(self._clean(str(text), name).strip() for text in values)

    def integer(self, name: str) -> int:
        """A whole number. Raises UserError where it is absent or none."""
        value = self.raw(name)
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{name} is {value!r}; it must be a whole number") from None

    def _written_list(self, text: str, name: str) -> Any:
        if len(text) > MAX_LIST_CHARACTERS:
            raise self.error(
                f"{name} has {len(text)} characters; a written list has at most {MAX_LIST_CHARACTERS}"
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # Python's quotes
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise self.error(
                f"{name} is {text[:80]!r}; it must be a list, as JSON or as Python writes it"
            ) from None

    def _clean(self, text: str, name: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{name} holds a lone surrogate at character {error.start}") from None
        return text.replace(IMAGE_MARK, _SPELLED_OUT_MARK)


def read_rows(path: Path, *suffixes: str) -> Iterator[Row]:
    """The rows of a file, or of the files with one of `suffixes` in a folder, by name.

    Raises UserError where there is no such file, one is too large, cannot be read or has no row.
    """
    for file in data_files(path, *suffixes):
        row = None
        try:
            for row in _READERS[file.suffix](file):
                yield row
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        if row is None:
            raise UserError(f"{file} has no rows; it must have at least one")


def data_files(path: Path, *suffixes: str) -> list[Path]:
    """`path` itself, or the files with one of `suffixes` in the folder that it is, sorted. Raises UserError."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
        if not files:
            raise UserError(f"{path} has no {' or '.join(suffixes)} file; give a folder with them, or a file")
        return files
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; it must be a {' or '.join(suffixes)} file, or a folder of them"
        )
    if path.suffix not in suffixes:
        raise UserError(f"{path} ends with {path.suffix!r}; it must be a {' or '.join(suffixes)} file")
    return [path]


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A file's bytes. Raises UserError where it is missing, unreadable, empty, or longer than `max_bytes`."""
    check_size(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def check_size(path: Path, max_bytes: int) -> None:
    """Raises UserError where a file is missing, empty, or longer than `max_bytes`."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; it must be a file")
    size = path.stat().st_size
    if not 0 < size <= max_bytes:
        raise UserError(f"{path} has {size} bytes; it must have 1 to {max_bytes}")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError where it is no file, too large, or no JSON."""
    try:
        return json.loads(read_bounded(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    check_size(path, MAX_FILE_BYTES)
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_CELL_BYTES + 1):
            number += 1
            if len(line) > MAX_CELL_BYTES:
                raise UserError(f"{path}, line {number} is longer than {MAX_CELL_BYTES} bytes")
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(fields, dict):
                raise UserError(f"{path}, line {number} is a {type(fields).__name__}; it must be an object")
            yield Row(fields, path, number)


def _read_tsv(path: Path) -> list[Row]:
    """All at once: the limit of a cell's length is the whole process's, and is put back at the end."""
    check_size(path, MAX_FILE_BYTES)
    limit_before = csv.field_size_limit(MAX_CELL_BYTES)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *table = csv.reader(file, delimiter="\t")
    except (csv.Error, ValueError) as error:  # a decoding error is a ValueError
        raise UserError(f"{path} is no table of tab-separated cells in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit_before)
    rows = []
    for number, cells in enumerate(table, start=1):
        if len(cells) != len(header):
            raise UserError(f"{path}, row {number} has {len(cells)} cells; the header names {len(header)}")
        rows.append(Row(dict(zip(header, cells, strict=True)), path, number))
    return rows


def _read_parquet(path: Path) -> Iterator[Row]:
    check_size(path, MAX_FILE_BYTES)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            num_bytes = sum(group.total_byte_size for group in groups)
            if num_bytes > MAX_FILE_BYTES:
                raise UserError(f"{path} holds {num_bytes} bytes decoded; the most is {MAX_FILE_BYTES}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, path, number)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole parquet file: {error} (after row {number})") from error


_READERS = {
    ".json": _read_json_lines,  # POPE's name for lines of JSON
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
}
