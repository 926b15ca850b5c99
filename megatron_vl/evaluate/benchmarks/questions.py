"""What the readers build items of: lettered options, prompts, and images where the text has marks for them."""

import re
import string
from collections.abc import Callable, Sequence

from megatron_vl.data.sample import IMAGE_MARK, Message, Sample
from megatron_vl.evaluate.benchmarks.files import Row
from megatron_vl.evaluate.items import ImageFile

LETTERS = string.ascii_uppercase
ANSWER_BY_LETTER = "Answer with the option's letter from the given choices directly."
ANSWER_BY_LETTER_CN = "请直接回答选项字母。"
ANSWER_BRIEFLY = "Answer the question using a single word or phrase."


def lettered(options: Sequence[str], form: str = "{}. {}", separator: str = "\n") -> str:
    """The options behind their letters."""
    return separator.join(
        form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False)
    )


def lines(*parts: str) -> str:
    """The parts that are not empty, a line each."""
    return "\n".join(part for part in parts if part)


def ask(text: str, num_images: int = 0) -> Sample:
    """A conversation with one message: the images, each on its line, then the text."""
    content = f"{IMAGE_MARK}\n" * num_images + text
    return Sample(messages=(Message(role="user", content=content),))


def place_images(
    text: str, marks: re.Pattern[str], find: Callable[[str], ImageFile], images: Sequence[ImageFile]
) -> tuple[Sample, tuple[ImageFile, ...]]:
    """A message whose benchmark's own `marks` have become image marks, and the images in their order.

    `find` gives a mark's image from the mark's group. A text without marks has all `images` in front.
    """
    names = marks.findall(text)
    if not names:
        return ask(text, len(images)), tuple(images)
    return ask(marks.sub(IMAGE_MARK, text)), tuple(find(name) for name in names)


def letter_index(row: Row, name: str, num_options: int) -> int:
    """The index of the option whose letter a field has. Raises UserError where no option has it."""
    return to_index(row, name, row.text(name), num_options)


def to_index(row: Row, name: str, letter: str, num_options: int) -> int:
    """The index of a letter. Raises UserError where it is none of the options' letters."""
    valid = LETTERS[:num_options]
    if len(letter) != 1 or letter not in valid:
        raise row.error(
            f"{name} is {letter[:80]!r}; it must be the letter of one of its options: {', '.join(valid)}"
        )
    return valid.index(letter)


def check_index(row: Row, name: str, num_options: int) -> int:
    """The index of an option that a field has. Raises UserError where there is no such option."""
    index = row.integer(name)
    if not 0 <= index < num_options:
        raise row.error(
            f"{name} is {index}; it must be the index of one of its {num_options} options, from 0"
        )
    return index
