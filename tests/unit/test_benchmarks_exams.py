"""Readers of MMMU, CMMMU and MathVista, on small files with the columns of the Hugging Face hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import exams
from megatron_vl.evaluate.items import Item

FIRST, SECOND = b"first image", b"second image"
Reader = Callable[[Path, Path | None], list[Item]]
MMMU = {
    "id": "validation_Art_Theory_12",
    "question": "Compare <image 2> with <image 1>.",
    "options": "['They\\'re equal', \"none\", 'both']",
    "explanation": "",
    "image_1": {"bytes": FIRST, "path": "a.png"},
    "image_2": {"bytes": SECOND, "path": "b.png"},
    **{f"image_{n}": None for n in range(3, 8)},
    "img_type": "['Paintings']",
    "answer": "C",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Art",
}
CMMMU = {
    "id": 7,
    "type": "选择",
    "question": '如图<img="p_1.png">所示，哪项正确？',
    "option1": "甲",
    "option2": "乙",
    "option3": "丙",
    "option4": "丁",
    "answer": "D",
    "category": "科学",
    "subcategory": "物理",
    **{f"image_{n}": None for n in range(1, 6)},
    **{f"image_{n}_filename": None for n in range(1, 6)},
    "image_1": {"bytes": FIRST, "path": "p_1.png"},
    "image_1_filename": "p_1.png",
}
MATHVISTA = {
    "pid": "1",
    "question": "How many?",
    "image": "images/1.jpg",
    "decoded_image": {"bytes": FIRST, "path": "1.jpg"},
    "choices": None,
    "unit": None,
    "precision": 2.0,
    "answer": "1.5",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"task": "math word problem", "category": "math-targeted-vqa"},
    "query": "Hint: Please answer.\nQuestion: How many?",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def asked(item: Item) -> str:
    (message,) = item.prompt.messages
    assert item.prompt.num_images == len(item.images)
    return message.content


def test_mmmu_puts_images_where_they_are_marked(tmp_path: Path) -> None:
    (item,) = exams.read_mmmu(write(tmp_path / "validation.parquet", MMMU), None)
    assert asked(item) == (
        "Compare <image> with <image>.\n(A) They're equal\n(B) none\n(C) both\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [image.read() for image in item.images] == [SECOND, FIRST]
    assert (item.options, item.correct) == (("They're equal", "none", "both"), 2)
    assert (item.key, item.category) == ("validation_Art_Theory_12", "Art_Theory")


def test_options_of_mmmu_that_are_images_are_compared_by_letter(tmp_path: Path) -> None:
    row = MMMU | {"question": "Which?", "options": "['<image 1>', '<image 2>']", "answer": "B"}
    (item,) = exams.read_mmmu(write(tmp_path / "v.parquet", row), None)
    assert asked(item).startswith("Which?\n(A) <image>\n(B) <image>\n")
    assert (item.options, item.correct) == (("A", "B"), 1)


@pytest.mark.parametrize(
    ("answer", "references"), [("['7', 'seven']", ("7", "seven")), ("$9,000", ("$9,000",))]
)
def test_open_questions_of_mmmu(tmp_path: Path, answer: str, references: tuple[str, ...]) -> None:
    row = MMMU | {"question_type": "open", "options": "[]", "answer": answer, "question": "How many?"}
    (item,) = exams.read_mmmu(write(tmp_path / "v.parquet", row), None)
    assert asked(item) == "<image>\n<image>\nHow many?\nAnswer the question using a single word or phrase."
    assert (item.references, item.options, item.correct) == (references, (), None)


def test_mmmu_as_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FIRST)
    fields = {name: MMMU[name] for name in ("id", "question_type", "answer")}
    row = fields | {"question": "See <image 1>", "options": ["x", "y", "z"], "image_1": "a.png"}
    (tmp_path / "v.jsonl").write_text(f"{json.dumps(row)}\n\n")
    (item,) = exams.read_mmmu(tmp_path / "v.jsonl", tmp_path)
    assert (item.images[0].path, item.images[0].read()) == (tmp_path / "a.png", FIRST)


def test_a_folder_stands_for_its_shards(tmp_path: Path) -> None:
    for number in (3, 1, 4, 0, 2):
        write(
            tmp_path / f"validation-0000{number}-of-00005.parquet", MMMU | {"id": f"validation_Art_{number}"}
        )
    (tmp_path / "README.md").write_text("no shard")
    assert [item.key for item in exams.read_mmmu(tmp_path, None)] == [f"validation_Art_{n}" for n in range(5)]


def test_cmmmu(tmp_path: Path) -> None:
    judged = CMMMU | {"id": 8, "type": "判断", "answer": "错", "question": "对吗？"}
    filled = CMMMU | {"id": 9, "type": "填空", "answer": "3.5"}
    several = CMMMU | {"id": 10, "answer": "AC"}
    choice, judgement, blank, many = exams.read_cmmmu(
        write(tmp_path / "val.parquet", CMMMU, judged, filled, several), None
    )
    assert asked(choice) == (
        "如图<image>所示，哪项正确？\n(A) 甲\n(B) 乙\n(C) 丙\n(D) 丁\n请直接回答选项字母。"
    )
    assert (choice.key, choice.options, choice.correct, choice.category) == (
        "7",
        ("甲", "乙", "丙", "丁"),
        3,
        "科学",
    )
    assert choice.images[0].read() == FIRST
    assert asked(judgement).startswith("<image>\n对吗？\n")
    assert (judgement.options, judgement.correct) == (("对", "错"), 1)
    assert (blank.options, blank.references) == ((), ("3.5",))
    assert (many.options, many.correct, many.references) == ((), None, ("A", "C"))


def test_mathvista(tmp_path: Path) -> None:
    choice = MATHVISTA | {"pid": "2", "choices": ["4", "5"], "answer": "5", "answer_type": "text"}
    count = MATHVISTA | {"pid": "3", "answer": "12", "answer_type": "integer", "precision": None}
    free, of_choices, integer = exams.read_mathvista(
        write(tmp_path / "t.parquet", MATHVISTA, choice, count), None
    )
    assert asked(free) == "<image>\nHint: Please answer.\nQuestion: How many?"
    assert (free.key, free.references, free.options, free.category) == (
        "1",
        ("1.50",),
        (),
        "math word problem",
    )
    assert (of_choices.options, of_choices.correct, of_choices.references) == (("4", "5"), 1, ())
    assert (integer.references, integer.images[0].read()) == (("12",), FIRST)


def test_mathvista_as_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(SECOND)
    path = tmp_path / "testmini.jsonl"
    path.write_text(json.dumps({name: value for name, value in MATHVISTA.items() if name != "decoded_image"}))
    assert exams.read_mathvista(path, tmp_path)[0].images[0].read() == SECOND


@pytest.mark.parametrize(
    ("read", "row", "complaint"),
    [
        (exams.read_mmmu, MMMU | {"answer": "D"}, "answer is 'D'; it must be the letter .*: A, B, C"),
        (exams.read_mmmu, MMMU | {"answer": "?"}, "answer is '\\?'.*take the dev or the validation split"),
        (exams.read_mmmu, MMMU | {"question": "<image 3>"}, "marks image '3', which it does not have"),
        (exams.read_mmmu, MMMU | {"options": "open('x')"}, "options is .*it must be a list"),
        (exams.read_mmmu, MMMU | {"options": "[" * 70_000}, "options has 70000 characters; .* at most 65536"),
        (exams.read_mmmu, MMMU | {"options": "[" * 5_000}, "options is .*it must be a list"),
        (exams.read_mmmu, MMMU | {"image_1": {"bytes": b"", "path": None}}, "its image has 0 bytes"),
        (exams.read_cmmmu, CMMMU | {"answer": "AE"}, "answer is 'E'"),
        (exams.read_cmmmu, CMMMU | {"answer": "?"}, "take the dev or the val split"),
        (exams.read_cmmmu, CMMMU | {"type": "问答"}, "type is '问答'; valid: 选择, 判断, 填空"),
        (exams.read_cmmmu, CMMMU | {"type": "判断"}, "answer is 'D'; it must be 对 or 错"),
        (exams.read_cmmmu, CMMMU | {"question": '<img="q.png">'}, "marks image 'q.png'"),
        (exams.read_mathvista, MATHVISTA | {"answer": ""}, "no answer, as in the test split"),
        (
            exams.read_mathvista,
            MATHVISTA | {"choices": ["4"]},
            "answer is '1.5'; it must be one of its choices",
        ),
        (
            exams.read_mathvista,
            MATHVISTA | {"answer": "many"},
            "answer is 'many', precision 2.0; both must be",
        ),
        (
            exams.read_mathvista,
            MATHVISTA | {"decoded_image": None, "image": None},
            "neither decoded_image nor",
        ),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, read: Reader, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"bad.parquet, row 1: .*{complaint}"):
        read(write(tmp_path / "bad.parquet", row), None)
