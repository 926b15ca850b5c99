"""A walk through a JSON text of any length, of which a chunk is held: where its values lie, in bytes."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 22  # bytes or characters read at once
SPACE = " \t\r\n"
BOM = b"\xef\xbb\xbf"


class FormatError(Exception):
    """What is wrong with a file as a whole, and where."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value, parsed, and where it lies. `start` is where its key does, in an object."""

    content: Any
    start: int
    offset: int
    size: int


class JsonText:
    """A reader's place in a text. `offset` is that place in bytes. Use as a context manager."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """A value may have about `max_bytes`."""
        file = path.open("rb")
        self.offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(self.offset)
        self._file: TextIO = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._max_bytes = max_bytes
        self._held, self._position = "", 0
        self._decoder = json.JSONDecoder()

    def __enter__(self) -> "JsonText":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

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
            raise FormatError(f"it ends at byte {self.offset}, within the list: the file was cut off")
        if found not in characters:
            raise FormatError(f"{complaint}; at byte {self.offset} there is {found!r}")
        self._position += 1
        self.offset += 1
        return found

    def value(self, name: str, start: int | None = None) -> Value:
        """Pass one value, which errors call `name`."""
        self.peek()
        more = CHUNK
        while True:
            try:
                content, end = self._decoder.raw_decode(self._held, self._position)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._held) - self._position > self._max_bytes:
                    raise FormatError(
                        f"{name}, at byte {self.offset}, is no JSON, or longer than "
                        f"data.max_sample_bytes={self._max_bytes} ({error})"
                    ) from error
                if not self._read_more(more):
                    raise FormatError(
                        f"{name}, at byte {self.offset}, is no JSON, or cut off ({error})"
                    ) from error
                more *= 2
        offset, size = self.offset, len(self._held[self._position : end].encode())
        self._position = end
        self.offset += size
        return Value(content=content, start=offset if start is None else start, offset=offset, size=size)

    def elements(self, name: str) -> Iterator[Value]:
        """The values of a list or an object, which errors call by `name` and number."""
        opening = self.expect("[{", "a list or an object must follow")
        closing = "]" if opening == "[" else "}"
        number = 0
        is_open = self.peek() != closing or not self.expect(closing, "")
        while is_open:
            start = None if opening == "[" else self._key(f"the key of {name} {number}")
            yield self.value(f"{name} {number}", start)
            number += 1
            complaint = f"after {name} {number - 1}, a comma or {closing} must follow"
            is_open = self.expect(f",{closing}", complaint) == ","

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller passes the value of each."""
        self.expect("{", "an object must follow")
        is_open = self.peek() != "}" or not self.expect("}", "")
        while is_open:
            key = self.value("a key").content
            self.expect(":", f"after the key {key!r}, a colon must follow")
            yield str(key)
            is_open = self.expect(",}", f"after the value of {key!r}, a comma or }} must follow") == ","

    def skip(self, name: str) -> None:
        """Pass a value of any length."""
        if self.peek() in ("[", "{"):
            for _ in self.elements(name):
                pass
        else:
            self.value(name)

    def expect_end(self, what: str) -> None:
        """Nothing may follow `what`."""
        if self.peek():
            raise FormatError(f"after {what} there is more, at byte {self.offset}")

    def _key(self, name: str) -> int:
        """Where the key lies; it and its colon are passed."""
        start = self.value(name).offset
        self.expect(":", f"after {name}, a colon must follow")
        return start

    def _read_more(self, num_characters: int) -> bool:
        more = self._file.read(num_characters)
        self._held, self._position = self._held[self._position :] + more, 0
        return bool(more)
