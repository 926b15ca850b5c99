"""From what was decided about a sample to the sample as it is stored."""

import random
from collections.abc import Mapping

from data_tools.quickstart.figures import Figure, render_figure
from data_tools.quickstart.pages import render_page
from data_tools.quickstart.photographs import Photograph
from data_tools.quickstart.text import Document, Question
from data_tools.recipe import Record, Rendered, one_each
from megatron_vl.data.sample import IMAGE_MARK

READ_THE_PAGE = "Read the page."

Images = dict[str, bytes]


def document_records(document: Document) -> Rendered:
    """text: the document alone."""
    return one_each(Record(fields={"text": document.text, "source": "text"}))


def question_records(question: Question) -> Rendered:
    """chat_text: one question and its answer."""
    return one_each(_conversation("chat_text", {question.question: question.answer}))


def page_records(text: str) -> Rendered:
    """pages: the image, then what it says. chat_pages: the same, asked for."""
    images = {"0.png": render_page(text)}
    return one_each(
        Record(fields={"text": IMAGE_MARK + text, "source": "pages"}, images=images),
        _conversation("chat_pages", {READ_THE_PAGE: text}, images),
    )


def figure_records(figure: Figure) -> Rendered:
    """figures: the image, then its code. chat_figures: all questions about it, in an order of its own."""
    images = {"0.png": render_figure(figure.code)}
    answers = list(figure.answers.items())
    random.Random(figure.code).shuffle(answers)
    return one_each(
        Record(fields={"text": IMAGE_MARK + figure.code, "source": "figures"}, images=images),
        _conversation("chat_figures", dict(answers), images),
    )


def photograph_records(photograph: Photograph) -> Rendered:
    """photographs: the image, then its caption."""
    images = {f"0{photograph.path.suffix}": photograph.path.read_bytes()}
    return one_each(
        Record(fields={"text": IMAGE_MARK + photograph.caption, "source": "photographs"}, images=images)
    )


def _conversation(source: str, answers: Mapping[str, str], images: Images | None = None) -> Record:
    """A user who asks in turn and an assistant; the images come before the first question."""
    images = images or {}
    messages: list[dict[str, str]] = []
    for question, answer in answers.items():
        marks = "" if messages else IMAGE_MARK * len(images)
        messages += [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}]
    return Record(fields={"messages": messages, "source": source}, images=images)
