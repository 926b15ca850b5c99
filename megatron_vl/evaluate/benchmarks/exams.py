"""Readers of exam-like benchmarks with images: MMMU, CMMMU, MathVista.

Each reads parquet as on the Hugging Face hub, or lines of JSON with the same fields, where an image is a path in
the folder `images`. A folder instead of a file stands for its files, such as the shards of one split; the split
must be one with answers. All raise UserError for whatever is missing, broken or too large.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vl.evaluate.benchmarks import pictures
from megatron_vl.evaluate.benchmarks.files import Row, read_rows
from megatron_vl.evaluate.benchmarks.questions import (
    ANSWER_BRIEFLY,
    ANSWER_BY_LETTER,
    ANSWER_BY_LETTER_CN,
    LETTERS,
    ask,
    letter_index,
    lettered,
    lines,
    place_images,
    to_index,
)
from megatron_vl.evaluate.items import ImageFile, Item

_MMMU_MARK = re.compile(r"<image (\d+)>")
_CMMMU_MARK = re.compile(r"""<img=["'“](.*?)["'”]>""")
_MMMU_SUBJECT = re.compile(r"(?:dev|validation|test)_(.+)_\d+")
_CMMMU_REQUESTS = {"选择": ANSWER_BY_LETTER_CN, "判断": "请回答“对”或“错”。", "填空": "请直接给出答案。"}


def read_mmmu(path: Path, images: Path | None) -> list[Item]:
    """MMMU (MMMU/MMMU, or merged as lmms-lab/MMMU): id, question, options, answer, question_type, image_1 … 7.

    options is a list written out in a string, question and options mark images as <image 1>; a mark becomes the
    image in its place. An open question may have several answers, written as a list. Prompt: the official one,
    i.e. question, options behind (A), and the request for a letter, or for a word or phrase. Options that are
    images are compared by their letters.
    """
    items = []
    for row in read_rows(path, ".parquet", ".jsonl"):
        by_number = {str(n): pictures.from_column(row, f"image_{n}", images) for n in range(1, 8)}
        is_choice = row.text("question_type") == "multiple-choice"
        options = row.texts("options") if is_choice else ()
        answer = row.text("answer")
        if answer == "?":
            raise row.error("answer is '?', as in the test split; take the dev or the validation split")
        text = lines(
            row.text("question"),
            lettered(options, "({}) {}"),
            ANSWER_BY_LETTER if is_choice else ANSWER_BRIEFLY,
        )
        prompt, placed = place_images(
            text, _MMMU_MARK, partial(_find, row, by_number), [image for image in by_number.values() if image]
        )
        subject = _MMMU_SUBJECT.fullmatch(row.text("id"))
        items.append(
            Item(
                key=row.text("id"),
                prompt=prompt,
                images=placed,
                options=_comparable(options, _MMMU_MARK),
                correct=letter_index(row, "answer", len(options)) if is_choice else None,
                references=() if is_choice else row.texts("answer") if answer[0] == "[" else (answer,),
                category=subject[1] if subject else "",
            )
        )
    return items


def read_cmmmu(path: Path, images: Path | None) -> list[Item]:
    """CMMMU (m-a-p/CMMMU, lmms-lab/CMMMU): id, type, question, option1 … 4, answer, category, image_1 … 5.

    Texts mark images as <img="NAME">, NAME being one of image_1_filename … 5. A question (type) is 选择, with one
    letter or several as its answer, 判断 (对 or 错), or 填空. Prompt: the question, lettered options, and a short
    request in Chinese. A question with several right options has their letters as references instead of options.
    """
    items = []
    for row in read_rows(path, ".parquet", ".jsonl"):
        kind, answer = row.text("type"), row.text("answer")
        if kind not in _CMMMU_REQUESTS:
            raise row.error(f"type is {kind!r}; valid: {', '.join(_CMMMU_REQUESTS)}")
        if answer == "?":
            raise row.error("answer is '?', as in the test split; take the dev or the val split")
        numbers = [n for n in range(1, 6) if pictures.from_column(row, f"image_{n}", images) is not None]
        by_name = {
            row.optional_text(f"image_{n}_filename"): pictures.from_column(row, f"image_{n}", images)
            for n in numbers
        }
        options = tuple(row.text(f"option{n}") for n in range(1, 5)) if kind == "选择" else ()
        text = lines(row.text("question"), lettered(options, "({}) {}"), _CMMMU_REQUESTS[kind])
        prompt, placed = place_images(
            text, _CMMMU_MARK, partial(_find, row, by_name), [image for image in by_name.values() if image]
        )
        items.append(
            Item(
                key=row.text("id"),
                prompt=prompt,
                images=placed,
                category=row.text("category"),
                **_cmmmu_answer(row, kind, options, answer),
            )
        )
    return items


def read_mathvista(path: Path, images: Path | None) -> list[Item]:
    """MathVista (AI4Math/MathVista): pid, query, choices, answer, answer_type, precision, image, decoded_image.

    Prompt: the benchmark's own `query`, with its hint of the answer's form. A choice's answer is its text. A
    float's reference is written with the decimals that `precision` says. In lines of JSON, `image` is the path.
    The category is metadata's task.
    """
    items = []
    for row in read_rows(path, ".parquet", ".jsonl"):
        column = "decoded_image" if row.fields.get("decoded_image") else "image"
        image = pictures.from_column(row, column, images)
        if image is None:
            raise row.error("it has neither decoded_image nor image")
        if not row.optional_text("answer"):
            raise row.error("no answer, as in the test split; take the testmini split")
        options = row.texts("choices") if row.fields.get("choices") else ()
        if options and row.text("answer") not in options:
            raise row.error(
                f"answer is {row.text('answer')!r}; it must be one of its choices {list(options)}"
            )
        metadata: Any = row.fields.get("metadata")
        items.append(
            Item(
                key=row.text("pid"),
                prompt=ask(row.text("query"), 1),
                images=(image,),
                options=options,
                correct=options.index(row.text("answer")) if options else None,
                references=() if options else (_mathvista_reference(row),),
                category=str(metadata.get("task", "")) if isinstance(metadata, dict) else "",
            )
        )
    return items


def _find(row: Row, images: dict[str, ImageFile | None], name: str) -> ImageFile:
    image = images.get(name)
    if image is None:
        raise row.error(f"its text marks image {name!r}, which it does not have")
    return image


def _comparable(options: tuple[str, ...], marks: re.Pattern[str]) -> tuple[str, ...]:
    """What is compared: the options' texts, or their letters where a text is none without its image."""
    has_image = any(marks.search(option) for option in options)
    return tuple(LETTERS[: len(options)]) if has_image else options


def _cmmmu_answer(row: Row, kind: str, options: tuple[str, ...], answer: str) -> dict[str, Any]:
    """Item's options, correct and references."""
    if kind == "填空":
        return {"references": (answer,)}
    if kind == "判断":
        if answer not in ("对", "错"):
            raise row.error(f"answer is {answer!r}; it must be 对 or 错")
        return {"options": ("对", "错"), "correct": int(answer == "错")}
    indices = [to_index(row, "answer", letter, len(options)) for letter in answer]
    if len(indices) > 1:
        return {"references": tuple(answer)}
    return {"options": _comparable(options, _CMMMU_MARK), "correct": indices[0]}


def _mathvista_reference(row: Row) -> str:
    answer = row.text("answer")
    if row.text("answer_type") != "float":
        return answer
    try:
        return f"{float(answer):.{max(int(float(row.text('precision'))), 0)}f}"
    except (ValueError, OverflowError):
        raise row.error(
            f"answer is {answer!r}, precision {row.raw('precision')!r}; both must be numbers"
        ) from None
