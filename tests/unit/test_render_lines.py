"""Lines hold all of a text, fit, and begin and end where Chinese and English allow it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.raw.render.lines import break_lines

OPENING, CLOSING = "（《“", "，。》）”"
TEXTS = st.text(st.sampled_from("ab -中文字\n" + OPENING + CLOSING), max_size=60)


@given(TEXTS, st.integers(1, 12))
def test_lines_hold_the_text_and_fit(text: str, width: int) -> None:
    """Every character is in one line, but the spaces between lines; widths are counted by hand."""
    widths = [1.0 if character.isascii() else 2.0 for character in text]
    lines = break_lines(text, widths, width)
    kept = "".join(text[start:end] for start, end in lines)
    assert kept.replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert all(text[start:end].count("\n") == 0 for start, end in lines)
    assert lines == sorted(lines)
    for start, end in lines:
        assert sum(widths[start:end]) <= width or end - start == 1


@given(TEXTS)
def test_no_line_begins_with_a_closing_mark_or_ends_with_an_opening_one(text: str) -> None:
    """Where words and marks are shorter than a line. Runs of marks may be longer."""
    for mark in OPENING + CLOSING:
        text = text.replace(mark, f"{mark}中文字") if mark in OPENING else text.replace(mark, f"中文字{mark}")
    text = text.replace("a", "a ").replace("b", "b ")
    if any(len(run) > 4 for run in "".join(c if c in OPENING + CLOSING else " " for c in text).split()):
        return
    widths = [1.0 if character.isascii() else 2.0 for character in text]
    for start, end in break_lines(text, widths, 24):
        line = text[start:end]
        forced = start == 0 or text[start - 1] == "\n"
        assert forced or not line or line[0] not in CLOSING
        assert end == len(text) or text[end] == "\n" or not line or line[-1] not in OPENING


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("one  two", 3, ["one", "two"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
        ("他说：“好。”走了", 8, ["他说：", "“好。”", "走了"]),
        ("see 中文abc text", 9, ["see 中文", "abc text"]),
        ("a\n\nb", 5, ["a", "", "b"]),
    ],
)
def test_lines(text: str, width: int, lines: list[str]) -> None:
    widths = [2.0 if character >= "\u2e80" or character in "“”" else 1.0 for character in text]
    assert [text[start:end] for start, end in break_lines(text, widths, width)] == lines
