"""Words of an image in the order in which they are read: lines from top to bottom, words from left to right."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word and where it is, in pixels from the top left."""

    text: str
    left: float
    top: float
    bottom: float

    @property
    def middle(self) -> float:
        """Half-way down."""
        return (self.top + self.bottom) / 2


def in_reading_order(words: Iterable[Word]) -> list[list[Word]]:
    """The lines. A word is on the line whose first word's height holds its middle.

    Columns and text from top to bottom are not seen as such: who needs them gives lines, not words.
    """
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda word: (word.middle, word.left)):
        if lines and lines[-1][0].top <= word.middle <= lines[-1][0].bottom:
            lines[-1].append(word)
        else:
            lines.append([word])
    return [sorted(line, key=lambda word: word.left) for line in lines]
