"""One sample as a shard stores it: KEY.json, parsed and checked. Its images lie beside it (`images.py`)."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_vl.config.errors import UserError

IMAGE_MARK = "<image>"
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}  # by extension
ROLES = ("system", "user", "assistant")

_IMAGE_NAME = re.compile(rf"(0|[1-9][0-9]{{0,3}})\.({'|'.join(IMAGE_FORMATS)})")


class SampleError(UserError):
    """One sample that cannot be used. `cause` is a category to count by, `detail` is this sample's own."""

    def __init__(self, cause: str, key: str, shard: str, detail: str = "") -> None:
        super().__init__(cause, key, shard, detail)  # all of them in args, so that it survives pickling
        self.cause, self.key, self.shard, self.detail = cause, key, shard, detail

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"sample {self.key!r} in {self.shard}: {self.cause}{detail}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document (`text`, of which the characters in `supervised` carry loss) or a conversation (`messages`).

    Exactly one of `text` and `messages` is given. `supervised` are ascending [start, end) character spans of
    `text`; None supervises all. A conversation supervises its answers. `IMAGE_MARK` stands for an image.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    supervised: tuple[tuple[int, int], ...] | None = None
    source: str = ""

    @property
    def num_images(self) -> int:
        contents = [self.text] if self.text is not None else [message.content for message in self.messages]
        return sum(content.count(IMAGE_MARK) for content in contents)


def parse_sample(data: bytes, key: str, shard: str, max_bytes: int) -> Sample:
    """The sample in KEY.json's bytes.

    Raises SampleError, naming shard and key, where it is longer than `max_bytes`, no JSON, or not as
    docs/data.md describes.
    """
    if len(data) > max_bytes:
        detail = f"{len(data)} bytes; the limit data.max_sample_bytes is {max_bytes}"
        raise SampleError("sample too large", key, shard, detail)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid JSON", key, shard, str(error)) from error
    try:
        return _resolve(fields)
    except ValueError as error:
        raise SampleError("invalid sample", key, shard, str(error)) from error


def order_images(names: Iterable[str], num_marks: int, key: str, shard: str) -> list[str]:
    """The image files of one sample ("0.jpg", "1.png", …: names without the key) in their numbers' order.

    Raises SampleError where they are not numbered 0 to `num_marks` - 1, the count of image marks.
    """
    numbered = {}
    for name in names:
        match = _IMAGE_NAME.fullmatch(name)
        if match is None or int(match[1]) in numbered:
            extensions = ", ".join(IMAGE_FORMATS)
            detail = (
                f"{name}; images are N.EXTENSION with N from 0, once each, and an extension of {extensions}"
            )
            raise SampleError("unexpected file", key, shard, detail)
        numbered[int(match[1])] = name
    if sorted(numbered) != list(range(num_marks)):
        detail = f"{num_marks} {IMAGE_MARK} marks in the text, images numbered {sorted(numbered)} beside it"
        raise SampleError("images do not match the marks", key, shard, detail)
    return [numbered[number] for number in range(num_marks)]


def _resolve(fields: Any) -> Sample:
    if not isinstance(fields, dict):
        raise ValueError(f"the top level is a {type(fields).__name__}; it must be an object")
    if ("text" in fields) == ("messages" in fields):
        raise ValueError('it must have either "text" or "messages", and not both')
    source = fields.get("source", "")
    if not isinstance(source, str):
        raise ValueError(f'"source" is {source!r}; it must be a string')
    if "messages" in fields:
        if "supervised" in fields:
            raise ValueError('"supervised" belongs to "text"; a conversation supervises its answers')
        return Sample(messages=_messages(fields["messages"]), source=source)
    text = _string(fields["text"], '"text"')
    return Sample(text=text, supervised=_spans(fields.get("supervised"), len(text)), source=source)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string and not blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate at character {error.start}") from error
    return value


def _spans(value: Any, length: int) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f'"supervised" is {value!r}; it must be a list of at least one [start, end]')
    last_end = 0
    for span in value:
        if not (isinstance(span, list) and len(span) == 2 and all(type(bound) is int for bound in span)):
            raise ValueError(f'"supervised" holds {span!r}; it must hold [start, end] pairs of integers')
        start, end = span
        if not last_end <= start < end <= length:
            raise ValueError(
                f'"supervised" span [{start}, {end}] must start at or after {last_end}, end after its start '
                f"and by {length}, the length of the text"
            )
        last_end = end
    return tuple((start, end) for start, end in value)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError('"messages" must be a list of {"role", "content"} objects')
    messages = []
    for position, turn in enumerate(value):
        if turn.get("role") not in ROLES:
            raise ValueError(f"message {position} has role {turn.get('role')!r}; valid: {', '.join(ROLES)}")
        content = _string(turn.get("content"), f"the content of message {position}")
        messages.append(Message(role=turn["role"], content=content))
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"roles are {roles}; user and assistant must alternate after at most one system message, "
            "and the assistant has the last word"
        )
    return tuple(messages)
