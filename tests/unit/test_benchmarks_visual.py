"""Readers of benchmarks about one image, on small files in the layouts in which they ship."""

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import visual
from megatron_vl.evaluate.items import Item

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
OTHER = PNG[::-1]
MMBENCH = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "l2-category",
    "split",
)


def encoded(data: bytes = PNG) -> str:
    return base64.b64encode(data).decode()


def write_tsv(path: Path, header: Sequence[str], *rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return path


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mmbench_row(index: str, image: str, answer: str = "B", hint: str = "", c: str = "") -> list[str]:
    return [index, 'Which "one"?', hint, "cat", "dog", c, "", answer, "ocr", image, "perception", "dev"]


def asked(item: Item) -> str:
    (message,) = item.prompt.messages
    assert message.role == "user"
    assert item.prompt.num_images == len(item.images)
    return message.content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("COCO_1.jpg", "1454426_2591111986", "v1_0.png", "1.png"):
        (images / name).write_bytes(PNG)
    return images


def test_mmbench(tmp_path: Path) -> None:
    rows = [
        mmbench_row("241", encoded(), hint="A hint,\nof two lines", c="bird"),
        mmbench_row("1000241", "241", answer="A"),
        mmbench_row("242", encoded(OTHER), hint="nan"),
    ]
    first, copy, last = visual.read_mmbench(write_tsv(tmp_path / "dev.tsv", MMBENCH, *rows), None)
    assert asked(first) == (
        '<image>\nA hint,\nof two lines\nWhich "one"?\nA. cat\nB. dog\nC. bird\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.key, first.options, first.correct, first.category) == (
        "241",
        ("cat", "dog", "bird"),
        1,
        "ocr",
    )
    assert (copy.key, copy.options, copy.correct) == ("1000241", ("cat", "dog"), 0)
    assert [item.images[0].read() for item in (first, copy, last)] == [PNG, PNG, OTHER]
    assert asked(last).startswith('<image>\nWhich "one"?\n')


def test_mmbench_cn_asks_in_chinese(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "dev_cn.tsv", MMBENCH, mmbench_row("1", encoded()))
    (item,) = visual.read_mmbench_cn(path, None)
    assert asked(item).endswith("\n请直接回答选项字母。")


def test_a_spelled_out_image_mark_is_no_image(tmp_path: Path) -> None:
    row = mmbench_row("1", encoded(), hint="the tag <image> in HTML")
    (item,) = visual.read_mmbench(write_tsv(tmp_path / "dev.tsv", MMBENCH, row), None)
    assert asked(item).count("<image>") == 1


@pytest.mark.parametrize("answer", ["['CENTRE', \"it's\"]", '["CENTRE", "it\'s"]'])
def test_ocrbench(tmp_path: Path, answer: str) -> None:
    header = ("index", "image", "question", "answer", "category")
    row = ("0", encoded(), "what is written in the image?", answer, "Regular Text Recognition")
    (item,) = visual.read_ocrbench(write_tsv(tmp_path / "OCRBench.tsv", header, row), None)
    assert asked(item) == "<image>\nwhat is written in the image?"
    assert (item.references, item.options, item.correct) == (("CENTRE", "it's"), (), None)
    assert (item.key, item.category, item.images[0].read()) == ("0", "Regular Text Recognition", PNG)


def test_seed_bench_leaves_out_videos_and_says_so(tmp_path: Path, folder: Path) -> None:
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    shared = choices | {"answer": "D", "question": "How many towels?", "data_source": "cc3m"}
    image = {
        "data_type": "image",
        "data_id": "1454426_2591111986",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = {"data_type": "video", "data_id": "1.webm", "question_id": "v0", "question_type_id": 10}
    content = {
        "question_type": {"Instances Counting": 5, "Action Recognition": 10},
        "questions": [shared | video, shared | image, shared | video],
    }
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="2 questions about videos are left out"):
        (item,) = visual.read_seed_bench(path, folder)
    assert (item.key, item.correct, item.category) == ("101669", 3, "Instances Counting")
    assert item.options == ("One", "Two", "Three", "Four")
    assert "How many towels?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with" in asked(item)
    assert item.images[0].read() == PNG


def test_pope_of_a_folder_has_its_files_as_categories(tmp_path: Path, folder: Path) -> None:
    row = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a car in the image?"}
    files = tmp_path / "coco"
    files.mkdir()
    write_lines(
        files / "coco_pope_random.json", row | {"label": "yes"}, row | {"question_id": 2, "label": "no"}
    )
    write_lines(files / "coco_pope_popular.json", row | {"label": "no"})
    popular, yes, no = visual.read_pope(files, folder)
    assert [item.key for item in (popular, yes, no)] == [
        "coco_pope_popular/1",
        "coco_pope_random/1",
        "coco_pope_random/2",
    ]
    assert [item.options[item.correct or 0] for item in (popular, yes, no)] == ["No", "Yes", "No"]
    assert asked(yes) == (
        "<image>\nIs there a car in the image?\nAnswer the question using a single word or phrase."
    )
    assert popular.category == "coco_pope_popular"


def test_pope_takes_a_line_s_own_category(tmp_path: Path, folder: Path) -> None:
    row = {"question_id": 1, "image": "COCO_1.jpg", "text": "?", "label": "yes", "category": "adversarial"}
    (item,) = visual.read_pope(write_lines(tmp_path / "llava_pope_test.jsonl", row), folder)
    assert (item.key, item.category) == ("adversarial/1", "adversarial")


def scienceqa_rows(with_image: Any) -> list[dict[str, Any]]:
    shared = {"task": "closed choice", "grade": "grade2", "lecture": "", "solution": ""}
    first = {"question": "Which is a solid?", "choices": ["milk", "a rock"], "answer": 1, "hint": "Select."}
    second = {"question": "Which city?", "choices": ["Rome", "Bonn", "Oslo"], "answer": 0, "hint": ""}
    return [
        shared | first | {"image": with_image, "subject": "natural science"},
        shared | second | {"image": None, "subject": "social science"},
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_scienceqa(tmp_path: Path, folder: Path, suffix: str) -> None:
    path = tmp_path / f"test.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(scienceqa_rows({"bytes": PNG, "path": "image.png"})), path)
    else:
        write_lines(path, *scienceqa_rows("1.png"))
    seen, unseen = visual.read_scienceqa(path, folder)
    assert asked(seen) == (
        "<image>\nContext: Select.\nWhich is a solid?\nA. milk\nB. a rock\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (seen.correct, seen.category, seen.images[0].read()) == (1, "natural science", PNG)
    assert (unseen.key, unseen.options, unseen.images) == ("test:2", ("Rome", "Bonn", "Oslo"), ())
    assert asked(unseen).startswith("Which city?\n")


def test_mm_vet(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "mm-vet.json"
    entry = {
        "imagename": "v1_0.png",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    }
    path.write_text(json.dumps({"v1_0": entry}))
    (item,) = visual.read_mm_vet(path, folder)
    assert asked(item) == "<image>\nWhat is x?"
    assert (item.key, item.references, item.category) == ("v1_0", ("-1<AND>-5",), "ocr, math")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (mmbench_row("1", encoded(), answer="C"), "row 1: answer is 'C'; it must be the letter .*: A, B$"),
        (mmbench_row("1", encoded(), answer="AB"), "row 1: answer is 'AB'"),
        (mmbench_row("1", encoded(), answer=""), "row 1: answer is ''; it must be a text"),
        (mmbench_row("x", encoded()), "row 1: index is 'x'; it must be a whole number"),
        (mmbench_row("1", encoded()[:50] + "*" + encoded()[50:]), "row 1: image is no base64"),
        (mmbench_row("1", "77"), "row 1: image is '77'; .*index of another row"),
        (mmbench_row("1", "1"), "row 1: image names row 1, which has no image"),
        (mmbench_row("1", encoded())[:-2], "row 1 has 10 cells; the header names 12"),
    ],
)
def test_bad_rows_of_mmbench_are_refused(tmp_path: Path, row: list[str], complaint: str) -> None:
    path = write_tsv(tmp_path / "dev.tsv", MMBENCH, row)
    with pytest.raises(UserError, match=f"dev.tsv, {complaint}"):
        visual.read_mmbench(path, None)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    header, row = MMBENCH[:7] + MMBENCH[8:], mmbench_row("1", encoded())
    path = write_tsv(tmp_path / "test.tsv", header, row[:7] + row[8:])
    with pytest.raises(UserError, match="no field 'answer'; it has index, question, hint"):
        visual.read_mmbench(path, None)


@pytest.mark.parametrize("answer", ["__import__('os')", "[]", "[''", "['']", "centre", "{'a': 1}", "[[1]]"])
def test_references_that_are_no_list_are_refused(tmp_path: Path, answer: str) -> None:
    header = ("index", "image", "question", "answer", "category")
    path = write_tsv(tmp_path / "o.tsv", header, ("0", encoded(), "?", answer, "x"))
    with pytest.raises(UserError, match=r"o.tsv, row 1: answer"):
        visual.read_ocrbench(path, None)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("missing.jpg", "missing.jpg does not exist"),
        ("../images/COCO_1.jpg", "must be a path inside of"),
        ("/etc/hostname", "must be a path inside of"),
        ("empty.jpg", "has 0 bytes"),
    ],
)
def test_bad_image_files_are_refused(tmp_path: Path, folder: Path, image: str, complaint: str) -> None:
    (folder / "empty.jpg").touch()
    path = write_lines(tmp_path / "p.jsonl", {"question_id": 1, "image": image, "text": "?", "label": "yes"})
    with pytest.raises(UserError, match=f"p.jsonl, row 1: its image .*{complaint}"):
        visual.read_pope(path, folder)


def test_a_folder_of_images_is_asked_for(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl", {"question_id": 1, "image": "a.jpg", "text": "?", "label": "yes"}
    )
    with pytest.raises(UserError, match=r"row 1: its image 'a.jpg' needs the folder"):
        visual.read_pope(path, None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], 'no "questions"'),
        ({"questions": []}, "no question about an image; its 0"),
        ({"questions": [{"data_type": "Single Image"}]}, "row 1: data_type is 'Single Image'"),
        ({"questions": [{"question": "?"}]}, "row 1: no field 'data_type'"),
    ],
)
def test_bad_files_of_seed_bench_are_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    path = tmp_path / "seed.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"seed.json.*{complaint}"):
        visual.read_seed_bench(path, tmp_path)


@pytest.mark.parametrize(
    ("answer", "complaint"), [(2, "answer is 2; .*2 options"), (-1, "answer is -1"), ("x", "whole")]
)
def test_an_answer_beyond_the_choices_is_refused(tmp_path: Path, answer: Any, complaint: str) -> None:
    row = scienceqa_rows(None)[0] | {"answer": answer}
    with pytest.raises(UserError, match=f"s.jsonl, row 1: .*{complaint}"):
        visual.read_scienceqa(write_lines(tmp_path / "s.jsonl", row), None)
