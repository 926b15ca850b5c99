"""KEY.json: what is taken, what is refused, and that the error names shard, key and cause."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import Message, Sample, SampleError, order_images, parse_sample

TURN = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def parse(fields: Any) -> Sample:
    return parse_sample(json.dumps(fields).encode(), "key", "shard-000000.tar", 10_000)


def test_a_document_keeps_its_text_spans_and_source() -> None:
    sample = parse(
        {"text": "a<image>b<image>", "supervised": [[0, 1], [8, 9]], "source": "pages", "kind": "?"}
    )
    assert sample == Sample(text="a<image>b<image>", supervised=((0, 1), (8, 9)), source="pages")
    assert sample.num_images == 2


def test_a_conversation_keeps_its_turns() -> None:
    system = {"role": "system", "content": "be brief"}
    sample = parse({"messages": [system, TURN | {"content": "<image>?"}, ANSWER, TURN, ANSWER]})
    assert sample.messages[0] == Message(role="system", content="be brief")
    assert [message.role for message in sample.messages[1:]] == ["user", "assistant"] * 2
    assert (sample.text, sample.num_images) == (None, 1)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ([], "must be an object"),
        ({}, "either"),
        ({"text": "a", "messages": [TURN, ANSWER]}, "either"),
        ({"text": " \n"}, "and not blank"),
        ({"text": 3}, "must be a string and"),
        ({"text": "a\ud800"}, "lone surrogate at character 1"),
        ({"text": "a", "source": 1}, '"source" is 1'),
        ({"text": "abc", "supervised": []}, "at least one"),
        ({"text": "abc", "supervised": [[0, 4]]}, r"\[0, 4\].* by 3, the length"),
        ({"text": "abc", "supervised": [[-1, 2]]}, r"\[-1, 2\]"),
        ({"text": "abc", "supervised": [[1, 1]]}, r"\[1, 1\]"),
        ({"text": "abc", "supervised": [[0, 2], [1, 3]]}, r"start at or after 2"),
        ({"text": "abc", "supervised": [[0, True]]}, "pairs of integers"),
        ({"text": "abc", "supervised": [[0, 1, 2]]}, "pairs of integers"),
        ({"messages": [TURN]}, "last word"),
        ({"messages": [ANSWER, TURN]}, "alternate"),
        ({"messages": [TURN, TURN, ANSWER]}, "alternate"),
        ({"messages": []}, "alternate"),
        ({"messages": ["hi"]}, "objects"),
        ({"messages": [TURN, ANSWER | {"role": "bot"}]}, "message 1 has role 'bot'"),
        ({"messages": [TURN, ANSWER | {"content": " "}]}, "content of message 1"),
        ({"messages": [TURN, ANSWER], "supervised": [[0, 1]]}, "supervises its answers"),
    ],
)
def test_a_bad_sample_is_refused_with_shard_key_and_complaint(fields: Any, complaint: str) -> None:
    with pytest.raises(
        SampleError, match=f"(?s)sample 'key' in shard-000000.tar: invalid sample.*{complaint}"
    ):
        parse(fields)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff{}", b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(SampleError, match="invalid JSON"):
        parse_sample(data, "key", "shard", 1_000_000)


def test_a_sample_beyond_the_size_limit_is_refused_unread() -> None:
    with pytest.raises(SampleError, match=r"9 bytes; the limit data.max_sample_bytes is 8"):
        parse_sample(b"not json!", "key", "shard", 8)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda values: (
            st.lists(values)
            | st.dictionaries(
                st.sampled_from(["text", "messages", "supervised", "source", "role", "content"]), values
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_the_json_holds_only_sample_errors_come_out(fields: Any) -> None:
    try:
        sample = parse(fields)
    except SampleError:
        return
    assert (sample.text is None) == bool(sample.messages)


def test_an_error_is_for_users_and_survives_pickling() -> None:
    error = SampleError("cause", "key", "shard", "detail")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, UserError)
    assert (str(copy), copy.cause, copy.key) == (str(error), "cause", "key")


@given(st.permutations(range(12)))
def test_images_are_ordered_by_number_not_by_name(numbers: list[int]) -> None:
    names = [f"{number}.png" for number in numbers]
    assert order_images(names, 12, "key", "shard") == [f"{number}.png" for number in range(12)]


@pytest.mark.parametrize(
    ("names", "num_marks"),
    [
        ([], 1),
        (["0.png"], 2),
        (["0.png", "1.png"], 1),
        (["1.png"], 1),
        (["0.jpg", "0.png"], 1),
        (["0.gif"], 1),
        (["00.png"], 1),
        (["0.png.bak"], 1),
        (["txt"], 0),
    ],
)
def test_images_that_do_not_match_the_marks_are_refused(names: list[str], num_marks: int) -> None:
    with pytest.raises(SampleError, match=r"sample 'key' in shard: (images do not match|unexpected file)"):
        order_images(names, num_marks, "key", "shard")
