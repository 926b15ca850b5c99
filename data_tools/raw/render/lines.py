"""Where a text may be broken into lines, Chinese and Japanese included."""

import unicodedata
from collections.abc import Sequence

# What may not begin a line, and what may not end one (W3C, Requirements for Chinese Text Layout, section 3.1.3).
NOT_FIRST = frozenset(
    "、，。．：；！？…‥—～·‧・％‰℃°」』）】》〉〕］｝〗”’,.:;!?)]}%ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ"
)
NOT_LAST = frozenset("「『（【《〈〔［｛〖“‘([{＄￥")


def break_lines(text: str, widths: Sequence[float], width: float) -> list[tuple[int, int]]:
    """The [start, end) of each line of `text`, no wider than `width`; `widths` are those of its characters.

    A line break in the text ends a line. Spaces at which a line is broken belong to none. A word that is wider
    than a line is broken anywhere, and one character that is wider has a line of its own.
    """
    lines, start = [], 0
    for paragraph in text.split("\n"):
        lines += [
            (start + s, start + e) for s, e in _wrap(paragraph, widths[start : start + len(paragraph)], width)
        ]
        start += len(paragraph) + 1
    return lines


def may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters that follow each other."""
    if before == " ":
        return after != " "
    if after == " " or after in NOT_FIRST or before in NOT_LAST:
        return False
    return _is_wide(before) or _is_wide(after)


def _wrap(text: str, widths: Sequence[float], width: float) -> list[tuple[int, int]]:
    lines, start = [], 0
    while True:
        end, used = start, 0.0
        while end < len(text) and (used + widths[end] <= width or text[end] == " " or end == start):
            used += widths[end]
            end += 1
        if end == len(text):
            lines.append((start, _before_spaces(text, start, end)))
            return lines
        places = (place for place in range(end, start, -1) if may_break(text[place - 1], text[place]))
        end = next((place for place in places if text[start:place].strip()), end)
        lines.append((start, _before_spaces(text, start, end)))
        start = end


def _before_spaces(text: str, start: int, end: int) -> int:
    return start + len(text[start:end].rstrip(" "))


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"
