"""Conversations as LLaVA, ShareGPT, ms-swift and LlamaFactory store them, in the form of docs/data.md."""

from typing import Any

from data_tools.raw.fields import image_of
from data_tools.raw.format import RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
UNUSED_MEDIA = ("video", "videos", "audio", "audios")


def read_conversation(record: Any, system: str) -> RawSample:
    """A record's messages and images; `system` begins the conversation where the record has no such message.

    Images without any mark go first in the first message of the user, one a line, as LLaVA does it. Raises
    RecordError where the record is not as docs/data.md describes; what it leaves to `parse_sample` are blank
    messages.
    """
    if not isinstance(record, dict):
        raise RecordError("not a conversation", f"it is a {type(record).__name__}; an object is needed")
    for field in UNUSED_MEDIA:
        if record.get(field):
            raise RecordError("other media", f'it has "{field}"; only text and images can be used')
    messages = _messages(record)
    given = record.get("system") or system
    if messages[0]["role"] != "system" and given:
        messages.insert(0, {"role": "system", "content": _text(given, 'its "system"')})
    _check_order([message["role"] for message in messages])
    images = _images(record)
    return RawSample(fields={"messages": _with_marks(messages, len(images))}, images=images)


def _messages(record: dict[str, Any]) -> list[dict[str, str]]:
    lists = [record[name] for name in ("conversations", "messages") if record.get(name)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise RecordError("not a conversation", 'it must have one list, "conversations" or "messages"')
    messages = []
    for position, turn in enumerate(lists[0]):
        if not isinstance(turn, dict):
            raise RecordError("not a conversation", f"turn {position} is no object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError("unknown role", f"turn {position} is from {role!r}; valid: {', '.join(ROLES)}")
        content = _text(turn.get("value", turn.get("content")), f"turn {position}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError("not a text", f"{what} is {type(value).__name__}; a string is needed")
    return value


def _check_order(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise RecordError("no answer", f"roles are {roles}; nothing would carry loss")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise RecordError(
            "roles do not alternate",
            f"roles are {roles}; after at most one system message, user and assistant must alternate, "
            "and the assistant has the last word",
        )


def _images(record: dict[str, Any]) -> list[str | bytes]:
    given = [record[name] for name in ("image", "images") if record.get(name)]
    if len(given) > 1:
        raise RecordError("unclear images", 'it has both "image" and "images"; one is needed')
    images = given[0] if given else []
    return [image_of(image) for image in (images if isinstance(images, list) else [images])]


def _with_marks(messages: list[dict[str, str]], num_images: int) -> list[dict[str, str]]:
    num_marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if num_marks == num_images:
        return messages
    if num_marks:
        raise RecordError(
            "images do not match the marks",
            f"{num_marks} {IMAGE_MARK} marks in the text, {num_images} images",
        )
    first = next(number for number, message in enumerate(messages) if message["role"] == "user")
    marked = f"{IMAGE_MARK}\n" * num_images + messages[first]["content"]
    return [*messages[:first], {"role": "user", "content": marked}, *messages[first + 1 :]]
