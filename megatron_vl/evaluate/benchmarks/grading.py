"""Graders: from an item and a generated text to a score in 0 … 1. A text that says nothing usable scores 0."""

import re

from megatron_vl.evaluate.benchmarks.answers import (
    last_number,
    matches_math,
    matches_open,
    numbers,
    option_index,
    option_letters,
    says_no,
    whole_number,
)
from megatron_vl.evaluate.items import Item

FORMULA_CATEGORY = "Handwritten Mathematical Expression Recognition"

_NEGATIVE = re.compile("不对|错|不正确|不准确|不合适|否定")
_POSITIVE = re.compile("对|正确|准确|肯定")


def grade_choice(item: Item, text: str) -> float:
    """Whether the answer names the right option, by letter or by text."""
    index = option_index(text, item.options)
    return float(index is not None and index == item.correct)


def grade_yes_no(item: Item, text: str) -> float:
    """POPE: the options are yes and no, and whatever is not a no is a yes."""
    return float(int(says_no(text)) == item.correct)


def grade_contained(item: Item, text: str) -> float:
    """OCRBench: whether a reference is contained; without case, for formulas without spaces instead."""
    if item.category == FORMULA_CATEGORY:
        return float(any(_packed(reference) in _packed(text) for reference in item.references))
    text = text.casefold().replace("\n", " ")
    return float(any(reference.casefold().replace("\n", " ") in text for reference in item.references))


def grade_mathvista(item: Item, text: str) -> float:
    """MathVista's comparison, on the last number or list of the answer.

    The official evaluation has a language model extract the answer; this one has no such help, so it compares
    with official scores from below. A reference shows by its form what it is: a list, a number with the
    decimals to round to, or a whole number, to which an answer is truncated.
    """
    if item.options:
        return grade_choice(item, text)
    reference = item.references[0]
    if reference.startswith("["):
        found = re.findall(r"\[[^\[\]]*\]", text)
        return float(bool(found) and numbers(found[-1]) == numbers(reference))
    number, wanted = last_number(text), whole_number(reference)
    if number is None or wanted is None or abs(number) == float("inf"):
        return 0.0
    decimals = len(reference.partition(".")[2])
    return float((round(number, decimals) if decimals else float(int(number))) == wanted)


def grade_open(item: Item, text: str) -> float:
    """MMMU: an option, or a reference in free form."""
    if item.options:
        return grade_choice(item, text)
    return float(any(matches_open(text, reference) for reference in item.references))


def grade_cmmmu(item: Item, text: str) -> float:
    """CMMMU: an option; several, whose letters are the references; 对 or 错; or a text to fill in."""
    if set(item.options) == {"对", "错"}:
        wrong = _NEGATIVE.search(text) is not None
        right = _POSITIVE.search(_NEGATIVE.sub("", text)) is not None
        return float(wrong != right and item.options.index("错" if wrong else "对") == item.correct)
    return grade_several(item, text) if len(item.references) > 1 else grade_open(item, text)


def grade_several(item: Item, text: str) -> float:
    """Whether the answer gives the letters of all right options, which are the references, and no other."""
    return float(option_letters(text) == frozenset(item.references))


def grade_agieval(item: Item, text: str) -> float:
    """AGIEval: an option; several, whose letters are the references; or a formula."""
    text = re.split(r"\n\s*(?:Q:|问题：)", text)[0]
    if item.options:
        return grade_choice(item, text)
    if len(item.references) > 1:
        return grade_several(item, text)
    return float(matches_math(text, item.references[0]))


def grade_gsm8k(item: Item, text: str) -> float:
    """GSM8K: the number after the first ####, or the last number; what follows a next question is cut off."""
    text = text.split("\nQuestion:")[0]
    marked = numbers(text.partition("####")[2])
    number = marked[0] if marked else last_number(text)
    return float(number is not None and number == whole_number(item.references[0]))


def _packed(text: str) -> str:
    return "".join(text.split())
