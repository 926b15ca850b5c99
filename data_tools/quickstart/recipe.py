"""The quickstart's sources, and which of their samples are held out.

text          documents of the Python installation
chat_text     questions about its functions and classes, and what their documentation says
pages         pages of its most common words; the text is what the page says
chat_pages    the same pages in a conversation
figures       plotting scripts and what they draw
chat_figures  the same figures, with questions about them
photographs   scikit-image's sample pictures and their captions; none is held out

No held-out text is a training text. Held-out pages have a sequence of words of their own, held-out figures a
combination of answers (and so a script) of their own; single words, colours and titles were all trained on.
"""

import hashlib
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from data_tools.quickstart import samples
from data_tools.quickstart.figures import draw_figures
from data_tools.quickstart.pages import draw_texts
from data_tools.quickstart.photographs import installed_photographs
from data_tools.quickstart.text import Document, Question, common_words, installation_documents, questions
from data_tools.quickstart.tokenizer import train_tokenizer
from data_tools.recipe import Part, Recipe, Rendered
from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK

SEED = 2024
NUM_WORDS, MAX_LETTERS = 40, 5  # of the words on pages
DRAWN_WITH = ("matplotlib", "pillow", "scikit-image", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many samples each kind has, at most; held-out ones come on top."""

    documents: int = 10_000
    questions: int = 2000
    pages: int = 3000
    figures: int = 2000
    heldout_documents: int = 100
    heldout_questions: int = 100
    heldout_pages: int = 200
    heldout_figures: int = 200


def quickstart(size: Size | None = None) -> Recipe:
    """The recipe, at its usual size or another."""
    size = size or Size()
    return Recipe(
        name="quickstart",
        version=_version(size),
        parts=partial(_parts, size),
        train_tokenizer=train_tokenizer,
    )


def _parts(size: Size) -> list[Part]:
    """Decide every sample, by SEED alone; nothing is rendered yet. Raises UserError where text is lacking."""
    generator = random.Random(SEED)
    documents = [document for document in installation_documents() if IMAGE_MARK not in document.text]
    words = common_words((document.text for document in documents), NUM_WORDS, MAX_LETTERS)
    if len(words) < NUM_WORDS:
        raise UserError(
            f"Python's library holds {len(documents)} documents with {len(words)} common words, {NUM_WORDS} "
            "are needed: use a Python installed with the sources of its library"
        )
    generator.shuffle(documents)
    heldout_documents = documents[: size.heldout_documents]
    documents = documents[size.heldout_documents :][: size.documents]
    heldout_questions = _draw_questions(heldout_documents, size.heldout_questions, set(), generator)
    heldout_answers = {question.answer for question in heldout_questions}
    pages = draw_texts(words, size.pages + size.heldout_pages, generator)
    heldout_pages = [text for text in pages if "\n" in text][: size.heldout_pages]
    figures = draw_figures(size.figures + size.heldout_figures, generator)
    return [
        *_both(("text",), samples.document_records, documents, heldout_documents),
        *_both(
            ("chat_text",),
            samples.question_records,
            _draw_questions(documents, size.questions, heldout_answers, generator),
            heldout_questions,
        ),
        *_both(("pages", "chat_pages"), samples.page_records, _without(pages, heldout_pages), heldout_pages),
        *_both(
            ("figures", "chat_figures"),
            samples.figure_records,
            figures[size.heldout_figures :],
            figures[: size.heldout_figures],
        ),
        Part(folders=("photographs",), drafts=installed_photographs(), render=samples.photograph_records),
    ]


def _both(
    sources: tuple[str, ...],
    render: Callable[[Any], Rendered],
    drafts: Sequence[Any],
    heldout: Sequence[Any],
) -> tuple[Part, Part]:
    """The same sources to train on and held out."""
    heldout_folders = tuple(f"heldout/{source}" for source in sources)
    return (
        Part(folders=sources, drafts=drafts, render=render),
        Part(folders=heldout_folders, drafts=heldout, render=render),
    )


def _draw_questions(
    documents: Iterable[Document], count: int, other_answers: set[str], generator: random.Random
) -> list[Question]:
    """At most `count` questions about the documents, whose answers differ and are none of `other_answers`."""
    by_answer: dict[str, Question] = {}
    for question in chain.from_iterable(map(questions, documents)):
        if question.answer not in other_answers:
            by_answer.setdefault(question.answer, question)
    drawn = list(by_answer.values())
    return generator.sample(drawn, min(count, len(drawn)))


def _without(texts: Iterable[str], left_out: Iterable[str]) -> list[str]:
    unwanted = set(left_out)
    return [text for text in texts if text not in unwanted]


def _version(size: Size) -> str:
    """Differs where what is built may: the recipe's code and size, Python and its text, the libraries."""
    code = sorted(Path(__file__).parent.glob("*.py"))
    libraries = [f"{name} {version(name)}" for name in DRAWN_WITH]
    digest = hashlib.sha256(repr((platform.python_version(), libraries, size)).encode())
    for path in code:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
