"""Readers of benchmarks that ask about one image: MMBench, OCRBench, SEED-Bench, POPE, ScienceQA, MM-Vet.

`images` is the folder of a benchmark's images; those that carry their images do not need it. All readers raise
UserError for whatever is missing, broken or too large.
"""

import warnings
from pathlib import Path
from typing import Any

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import pictures
from megatron_vl.evaluate.benchmarks.files import Row, read_json, read_rows
from megatron_vl.evaluate.benchmarks.questions import (
    ANSWER_BRIEFLY,
    ANSWER_BY_LETTER,
    ANSWER_BY_LETTER_CN,
    ask,
    check_index,
    letter_index,
    lettered,
    lines,
)
from megatron_vl.evaluate.items import ImageFile, Item

_MAX_REFERENCE_CHARACTERS = 64  # a shorter image column is another row's index


def read_mmbench(path: Path, images: Path | None) -> list[Item]:
    """MMBench's .tsv (open-compass/MMBench, as VLMEvalKit ships it; also with its 1,000,000 + index copies).

    Columns index, question, hint, A to D (blank where there are fewer), answer, category, image: base64, or the
    index of the row that has it. The split must be one with answers. Prompt: LLaVA's, i.e. hint, question,
    lettered options, and the request for a letter.
    """
    return _read_mmbench(path, ANSWER_BY_LETTER)


def read_mmbench_cn(path: Path, images: Path | None) -> list[Item]:
    """MMBench-CN: `read_mmbench`, with LLaVA's request for a letter in Chinese."""
    return _read_mmbench(path, ANSWER_BY_LETTER_CN)


def read_ocrbench(path: Path, images: Path | None) -> list[Item]:
    """OCRBench's .tsv (echo840/OCRBench, as VLMEvalKit ships it): index, image, question, answer, category.

    The answer is a list of references, written out as Python or JSON. Prompt: the question alone.
    """
    items = []
    for row in read_rows(path, ".tsv"):
        item = Item(
            key=row.text("index"),
            prompt=ask(row.text("question"), 1),
            images=(pictures.from_base64(row, row.text("image")),),
            references=tuple(answer for answer in row.texts("answer") if answer),
            category=row.text("category"),
        )
        if not item.references:
            raise row.error("answer holds nothing but blanks; it must have a text to find")
        items.append(item)
    return items


def read_seed_bench(path: Path, images: Path | None) -> list[Item]:
    """SEED-Bench's (version 1) SEED-Bench.json (AILab-CVC/SEED-Bench): "questions" and "question_type".

    An image question has data_type "image" and its file's name, without extension, in data_id. Questions about
    videos are left out, and a warning says how many. Prompt: LLaVA's, as for MMBench.
    """
    content = read_json(path)
    questions = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
        raise UserError(f'{path} has no "questions", which must be a list of objects')
    types = content.get("question_type", {})
    names = {number: name for name, number in types.items()} if isinstance(types, dict) else {}
    rows = [Row(fields, path, number) for number, fields in enumerate(questions, start=1)]
    for row in rows:
        if row.text("data_type") not in ("image", "video"):
            raise row.error(
                f"data_type is {row.text('data_type')!r}; SEED-Bench, version 1, has image and video"
            )
    about_images = [row for row in rows if row.text("data_type") == "image"]
    if not about_images:
        raise UserError(f"{path} has no question about an image; its {len(rows)} questions are about videos")
    if len(about_images) < len(rows):
        num_videos = len(rows) - len(about_images)
        warnings.warn(f"{path}: {num_videos} questions about videos are left out", stacklevel=2)
    return [_seed_item(row, names, images) for row in about_images]


def read_pope(path: Path, images: Path | None) -> list[Item]:
    """POPE's lines of JSON (RUCAIBox/POPE: coco_pope_random.json …), one file or a folder of them.

    Fields question_id, image (a file of COCO val2014), text, label (yes or no). The category is the line's own,
    as in LLaVA's merged file, or else the file's name. Prompt: LLaVA's request for a single word or phrase.
    """
    items = []
    for row in read_rows(path, ".json", ".jsonl"):
        label = row.text("label")
        if label not in ("yes", "no"):
            raise row.error(f"label is {label!r}; it must be yes or no")
        category = row.optional_text("category") or row.path.stem
        items.append(
            Item(
                key=f"{category}/{row.text('question_id')}",
                prompt=ask(lines(row.text("text"), ANSWER_BRIEFLY), 1),
                images=(pictures.from_folder(row, row.text("image"), images),),
                options=("Yes", "No"),
                correct=int(label == "no"),
                category=category,
            )
        )
    return items


def read_scienceqa(path: Path, images: Path | None) -> list[Item]:
    """ScienceQA in parquet (derek-thomas/ScienceQA, lmms-lab/ScienceQA), or the same fields as lines of JSON.

    Fields image (may be null), question, choices, answer (an index), hint, subject. Prompt: lmms-eval's, i.e.
    context, question, lettered choices, and the request for a letter. Rows have no key, so theirs is FILE:ROW.
    """
    items = []
    for row in read_rows(path, ".parquet", ".jsonl"):
        choices = row.texts("choices")
        image = pictures.from_column(row, "image", images)
        hint = row.optional_text("hint")
        context = f"Context: {hint}" if hint else ""
        text = lines(context, row.text("question"), lettered(choices), ANSWER_BY_LETTER)
        items.append(
            Item(
                key=f"{row.path.stem}:{row.number}",
                prompt=ask(text, int(image is not None)),
                images=(image,) if image else (),
                options=choices,
                correct=check_index(row, "answer", len(choices)),
                category=row.optional_text("subject"),
            )
        )
    return items


def read_mm_vet(path: Path, images: Path | None) -> list[Item]:
    """MM-Vet's mm-vet.json (yuweihao/MM-Vet): {"v1_0": {"imagename", "question", "answer", "capability"}, …}.

    The official grader is a language model, which compares with the reference. Prompt: the question alone, as
    LLaVA asks it.
    """
    content: Any = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} must be an object with a question under each key")
    items = []
    for number, (key, fields) in enumerate(content.items(), start=1):
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {key} is a {type(fields).__name__}; it must be an object")
        row = Row(fields, path, number)
        items.append(
            Item(
                key=key,
                prompt=ask(row.text("question"), 1),
                images=(pictures.from_folder(row, row.text("imagename"), images),),
                references=(row.text("answer"),),
                category=", ".join(row.texts("capability")),
            )
        )
    return items


def _read_mmbench(path: Path, request: str) -> list[Item]:
    rows = list(read_rows(path, ".tsv"))
    by_index = {row.text("index"): row for row in rows}
    items = []
    for row in rows:
        letters = [letter for letter in "ABCD" if letter in row.fields]
        blank = next((at for at, letter in enumerate(letters) if not row.optional_text(letter)), len(letters))
        options = tuple(row.text(letter) for letter in letters[:blank])
        text = lines(row.optional_text("hint"), row.text("question"), lettered(options), request)
        items.append(
            Item(
                key=str(row.integer("index")),
                prompt=ask(text, 1),
                images=(_mmbench_image(row, by_index),),
                options=options,
                correct=letter_index(row, "answer", len(options)),
                category=row.text("category"),
            )
        )
    return items


def _mmbench_image(row: Row, by_index: dict[str, Row]) -> ImageFile:
    image = row.text("image")
    if len(image) > _MAX_REFERENCE_CHARACTERS:
        return pictures.from_base64(row, image)
    if image not in by_index:
        raise row.error(f"image is {image!r}; it must be an image in base64, or the index of another row")
    referenced = by_index[image]
    if len(referenced.text("image")) <= _MAX_REFERENCE_CHARACTERS:
        raise row.error(f"image names row {image}, which has no image of its own")
    return pictures.from_base64(referenced, referenced.text("image"))


def _seed_item(row: Row, type_names: dict[Any, str], images: Path | None) -> Item:
    options = tuple(row.text(f"choice_{letter}") for letter in "abcd")
    kind = row.integer("question_type_id")
    return Item(
        key=row.text("question_id"),
        prompt=ask(lines(row.text("question"), lettered(options), ANSWER_BY_LETTER), 1),
        images=(pictures.from_folder(row, row.text("data_id"), images),),
        options=options,
        correct=letter_index(row, "answer", len(options)),
        category=str(type_names.get(kind, kind)),
    )
