"""Tables and charts become an image and a text; of an answer to a question, the answer alone carries loss."""

import json
from typing import Any

import pytest

from data_tools.raw.format import RecordError
from data_tools.raw.tables import read_table
from megatron_vl.data.sample import parse_sample

TOKENS = (
    '<thead> <tr> <td  colspan="2" > </td> </tr> </thead> <tbody> <tr> <td> </td> <td> </td> </tr> </tbody>'
)
PUBTABNET = {
    "structure": {"tokens": [" colspan=" + one[8:] if "col" in one else one for one in TOKENS.split()]},
    "cells": [{"tokens": ["<b>", "Y", "</b>"], "bbox": [1, 2, 3, 4]}, {"tokens": ["1"]}, {"tokens": []}],
}
HTML = '<table><thead><tr><td colspan="2"><b>Y</b></td></tr></thead><tbody><tr><td>1</td><td></td></tr></tbody></table>'


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": " a\tb\n1\t2 "}, "<image>a\tb\n1\t2"),
        ({"table": "a | b"}, "<image>a | b"),
        ({"table": [["a ", "b\nc"], [1, 2.5], [None, "d"]]}, "<image>a | b c\n1 | 2.5\n | d"),
        ({"html": "<table></table>", "split": "train"}, "<image><table></table>"),
        ({"html": PUBTABNET}, f"<image>{HTML}"),
        ({"label": 7}, "<image>7"),
    ],
)
def test_the_content_follows_its_image(fields: dict[str, Any], text: str) -> None:
    sample = read_table({"imgname": "a.png"} | fields, "unused")
    assert (sample.fields, list(sample.images)) == ({"text": text}, ["a.png"])


@pytest.mark.parametrize(("question", "answer"), [("question", "answer"), ("query", "label")])
def test_an_answer_alone_carries_loss(question: str, answer: str) -> None:
    """As ChartQA and UniChart have them."""
    sample = read_table({"imgname": "a.png", question: "多少? ", answer: " Seven."}, "")
    text = sample.fields["text"]
    assert text == "<image>多少?\nSeven."
    ((start, end),) = sample.fields["supervised"]
    assert text[start:end] == "Seven."
    parse_sample(json.dumps(sample.fields).encode(), "k", "s", 1000)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"imgname": "a.png"}, "it has none"),
        ({"imgname": "a.png", "text": "a", "answer": "b"}, "it has text, answer"),
        (
            {"imgname": "a.png", "query": "a", "question": "b", "answer": "c"},
            "it has question, query, answer",
        ),
        ({"imgname": "a.png", "table": [["a"], "b"]}, "a row of its"),
        ({"imgname": "a.png", "table": [[{}]]}, "a row of its"),
        ({"imgname": "a.png", "label": ["a"]}, '"label" is list'),
        ({"imgname": "a.png", "text": " "}, "is blank"),
        ({"imgname": "a.png", "html": {"structure": {}}}, "not as PubTabNet has it"),
        ({"imgname": "a.png", "html": {**PUBTABNET, "cells": PUBTABNET["cells"][1:]}}, "fewer cells"),
        ({"imgname": "a.png", "html": {**PUBTABNET, "cells": PUBTABNET["cells"] * 2}}, "more cells"),
        ({"text": "a"}, "must name one image"),
        ({"imgname": "a.png", "text": "an <image>"}, "stands for an image"),
        (["a"], "an object is needed"),
    ],
)
def test_what_cannot_be_used_says_why(fields: Any, detail: str) -> None:
    with pytest.raises(RecordError) as raised:
        read_table(fields, "")
    assert detail in raised.value.detail
