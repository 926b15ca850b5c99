"""One record to messages and images: the layouts in use, LLaVA's habit with marks, what is refused and why."""

from typing import Any

import pytest

from data_tools.raw.conversations import read_conversation
from data_tools.raw.format import RecordError

ASKS, ANSWERS = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bar."}
USER, ASSISTANT = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bar."}


def read(**record: Any) -> tuple[list[dict[str, str]], list[str]]:
    conversation = read_conversation(record, "")
    return conversation.fields["messages"], conversation.images


@pytest.mark.parametrize(
    "record",
    [
        {"id": 3, "conversations": [ASKS, ANSWERS]},
        {"conversations": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "A bar."}]},
        {"messages": [USER, ASSISTANT], "images": []},
        {"conversations": [USER, ASSISTANT], "image": None, "system": "", "videos": []},
    ],
)
def test_the_layouts_mean_the_same(record: dict[str, Any]) -> None:
    assert read(**record) == ([USER, ASSISTANT], [])


def test_marks_stay_where_they_are() -> None:
    turns = [{"from": "human", "value": "Is <image> or\n<image> it?"}, ANSWERS, ASKS, ANSWERS]
    messages, images = read(conversations=turns, image=["b.jpg", "a/c.png"])
    assert [message["content"] for message in messages] == [turn["value"] for turn in turns]
    assert images == ["b.jpg", "a/c.png"]


def test_images_without_marks_go_first_in_the_first_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    for images in (["a.jpg"], ["a.jpg", "b.jpg"]):
        messages, found = read(messages=[system, USER, ASSISTANT, USER, ASSISTANT], images=images)
        marked = {"role": "user", "content": "<image>\n" * len(images) + "What?"}
        assert (messages, found) == ([system, marked, ASSISTANT, USER, ASSISTANT], images)
    assert read(image="a.jpg", conversations=[ASKS, ANSWERS])[1] == ["a.jpg"]


def test_the_nearest_system_message_counts() -> None:
    own = {"from": "system", "value": "own"}
    records = [
        ({"conversations": [own, ASKS, ANSWERS], "system": "the record's"}, "own"),
        ({"conversations": [ASKS, ANSWERS], "system": "the record's"}, "the record's"),
        ({"conversations": [ASKS, ANSWERS]}, "the source's"),
    ]
    for record, expected in records:
        messages = read_conversation(record, "the source's").fields["messages"]
        assert [message["content"] for message in messages] == [expected, "What?", "A bar."]


@pytest.mark.parametrize(
    ("record", "cause", "detail"),
    [
        ([], "not a conversation", "it is a list"),
        ({}, "not a conversation", '"conversations" or "messages"'),
        ({"conversations": [ASKS], "messages": [USER]}, "not a conversation", "one list"),
        ({"conversations": "What?"}, "not a conversation", "one list"),
        ({"conversations": ["What?"]}, "not a conversation", "turn 0"),
        ({"conversations": [ASKS, {"from": "function", "value": "{}"}]}, "unknown role", "'function'"),
        ({"conversations": [{"from": [], "value": ""}]}, "unknown role", "turn 0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "not a text", "turn 0 is list"),
        ({"messages": [USER, ASSISTANT], "system": 3}, "not a text", '"system" is int'),
        ({"conversations": [ASKS]}, "no answer", "['user']"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "no answer", "['system']"),
        ({"conversations": [ASKS, ANSWERS, ASKS]}, "roles do not alternate", "the last word"),
        ({"conversations": [ANSWERS, ASKS]}, "roles do not alternate", "['assistant', 'user']"),
        ({"conversations": [ASKS, ASKS, ANSWERS]}, "roles do not alternate", "must alternate"),
        ({"messages": [USER, ASSISTANT], "video": "a.mp4"}, "other media", '"video"'),
        ({"messages": [USER, ASSISTANT], "images": [{"url": "a"}]}, "unclear images", "file names"),
        ({"messages": [USER, ASSISTANT], "image": "a", "images": ["a"]}, "unclear images", "both"),
        ({"messages": [USER, {**ASSISTANT, "content": "<image>"}]}, "images do not match the marks", "1 .*0"),
        (
            {"messages": [{**USER, "content": "<image>"}, ASSISTANT], "images": ["a", "b"]},
            "images do not match the marks",
            "1 <image> marks in the text, 2 images",
        ),
    ],
)
def test_what_cannot_be_used_has_a_cause(record: Any, cause: str, detail: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_conversation(record, "")
    assert caught.value.cause == cause
    assert all(part in caught.value.detail for part in detail.split(".*"))
