"""What a generated answer says: a letter, several, yes or no, a number, a short text.

A parser gives None where a text says nothing of the kind. Some public harnesses draw an option at random
there; here such an answer is wrong, so that a score is a function of the answers.
"""

import math
import re
from collections.abc import Sequence

from megatron_vl.evaluate.benchmarks.questions import LETTERS

# A letter that no letter or apostrophe touches; \b would not part it from Chinese text.
_LONE = r"(?<![A-Za-z'’])[A-Z](?![A-Za-z'’])"
_SAID = re.compile(
    rf"(?:(?i:answer|option|choice|choose|select)|答案|选择|选项|选|应为)"
    rf"(?:\s+(?i:is|are|would be|should be))?(?:应该)?[是为：:\s]*(?:(?i:option)\s+)?[\s*\"“'(（【\[]*({_LONE})"
)
_CONFIRMED = re.compile(
    rf"({_LONE})[)）.*\"”\s]*(?i:is|would be)\s+(?i:the\s+)?(?i:correct|right|best|answer)"
)
_ALONE = re.compile(r"[\W_]*([A-Z])[\W_]*")
_LEADING = re.compile(r"[\s*\"“'(（【\[]*([A-Z])(?:\s*[)）】\].:：、,，*]|\s*\n)")
_BRACKETED = re.compile(r"[(（【\[]\s*([A-Z])\s*[)）】\]]")
# "A cat" and "I see" are no answers; "A or B" is two.
_ISOLATED = re.compile(rf"(?![AI]\s+(?!(?:or|and|is)\b)[a-z])({_LONE})")

_RUN = re.compile(r"(?<![A-Za-z'’])[A-Z](?:(?:[ \t,，、;&和]|and)*[A-Z])*(?![A-Za-z'’])")
_ANSWER_WORD = re.compile(r"(?i:answers?|options?)(?:\s+(?i:is|are))?|答案|应选择?|我们选择?")

_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?![\d])"
    r"|(?:(?<![\w.)])[-−])?\.\d+(?:[eE][+-]?\d{1,3})?"
)


def option_index(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer names: by its letter, in the usual phrasings, or by its own text.

    The surer phrasings go first: the letter alone, the option's text alone, a letter in front, "the answer is",
    a letter in brackets, the only lone letter, the only option that the answer contains.
    """
    text = text.strip()
    valid = LETTERS[: len(options)]
    alone = _ALONE.fullmatch(text)
    if alone and alone[1] in valid:
        return valid.index(alone[1])
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return plain.index(_plain(text))
    leading = _LEADING.match(text)
    if leading and leading[1] in valid:
        return valid.index(leading[1])
    for pattern in (_SAID, _CONFIRMED, _BRACKETED):
        letters = [letter for letter in pattern.findall(text) if letter in valid]
        if letters:
            return valid.index(letters[-1])
    isolated = {letter for letter in _ISOLATED.findall(text) if letter in valid}
    if len(isolated) == 1:
        return valid.index(isolated.pop())
    contained = [index for index, option in enumerate(plain) if option and _contains(_plain(text), option)]
    return contained[0] if len(contained) == 1 else None


def option_letters(text: str) -> frozenset[str]:
    """The letters of an answer to a question with several right options: "ACD", "A, C and D", "答案是AC"."""
    after = _ANSWER_WORD.split(text)[-1]
    run = _RUN.search(after) or _RUN.search(text)
    return frozenset(re.findall("[A-Z]", run[0])) if run else frozenset()


def says_no(text: str) -> bool:
    """Whether the first sentence holds "no" or "not": POPE's rule, by which everything else is a yes."""
    return re.search(r"\b(?:no|not)\b", text.split(".")[0], re.IGNORECASE) is not None


def numbers(text: str) -> list[float]:
    """The numbers in a text: 42, -3, 1,234.5, .5, 1e-7. A minus after a word or a digit is a dash."""
    return [float(match.replace(",", "").replace("−", "-")) for match in _NUMBER.findall(text)]


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = numbers(text)
    return found[-1] if found else None


def whole_number(text: str) -> float | None:
    """The number that a text is, and nothing else."""
    match = _NUMBER.fullmatch(text.strip())
    return numbers(match[0])[0] if match else None


def matches_open(text: str, reference: str) -> bool:
    """Whether an answer in free form gives a reference, by MMMU's rule.

    What counts is what follows the last "is", "so", "answer" … or "=" of a line or sentence, or the whole where
    there is none. A number must be among its numbers, to two decimals; a text must be contained; a single
    character must stand alone.
    """
    tails = _conclusions(text)
    number = whole_number(reference)
    if number is not None:
        return any(_round(candidate) == _round(number) for tail in tails for candidate in numbers(tail))
    reference = reference.strip().casefold()
    if len(reference) == 1:
        return any(_contains(tail, reference) for tail in tails)
    return any(reference in tail for tail in tails)


def matches_math(text: str, reference: str) -> bool:
    """Whether an answer gives a reference that is mathematics.

    What counts is the last \\boxed{…}; without one the last $…$, the first line, and what follows "answer is" in
    the last line. Of an equation its right side counts as well.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        given = [boxed]
    else:
        written = [line for line in text.splitlines() if line.strip()] or [""]
        said = re.split(r"(?i)answer is:?|答案[是为：:]*", written[-1])[-1]
        given = [*re.findall(r"\$([^$]+)\$", text)[-1:], written[0], said]
    candidates = {_bare_math(form) for part in given for form in (part, part.rsplit("=", 1)[-1])}
    wanted = _bare_math(reference)
    if wanted in candidates:
        return True
    number = whole_number(wanted)
    return number is not None and any(whole_number(form) == number for form in candidates)


def _conclusions(text: str) -> list[str]:
    text = text.strip().rstrip(".。").casefold()
    tails = []
    for sentence in re.split(r"\.\s|\n|。", text):
        words = re.split(
            r"\b(?:could be|so|is|thus|therefore|final|answer|result)\b|=|答案|等于|因此|所以|是|为", sentence
        )
        tail = words[-1].strip(" :：,，.")
        if len(words) > 1 and tail:
            tails.append(tail)
    return tails or [text]


def _round(number: float) -> float:
    return round(number, 2) if math.isfinite(number) else number


def _plain(text: str) -> str:
    return " ".join(text.strip().rstrip(".。").casefold().split())


def _contains(text: str, part: str) -> bool:
    """Whether `part` is in `text`, not as a part of a longer English word or number."""
    before = r"(?<![a-z0-9])" if re.match("[a-z0-9]", part) else ""
    after = r"(?![a-z0-9])" if re.search("[a-z0-9]$", part) else ""
    return re.search(before + re.escape(part) + after, text) is not None


def _last_boxed(text: str) -> str | None:
    """What the last \\boxed{…} holds, to the brace that closes it."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 0, start + len("\\boxed{")
    for position in range(inside, len(text)):
        if text[position] == "}" and depth == 0:
            return text[inside:position]
        depth += {"{": 1, "}": -1}.get(text[position], 0)
    return None


def _bare_math(text: str) -> str:
    """A formula without what does not change its value: spaces, dollars, sizes of brackets, a final stop."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:)", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s|\$|\\%|%|\^\{?\\circ\}?", "", text).rstrip(".。")
