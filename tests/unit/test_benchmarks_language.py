"""Readers of benchmarks over text, on small files in the layouts in which they ship."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import language
from megatron_vl.evaluate.benchmarks.catalog import BENCHMARKS

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "is using wrap.",
        "rips tiles.",
        "holds a cube.",
        "starts [substeps] pulling [title] Then stops.",
    ],
}
MMLU = {
    "question": "Find the degree.",
    "subject": "abstract_algebra",
    "choices": ["0", "4", "2", "6"],
    "answer": 1,
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hellaswag(tmp_path: Path) -> None:
    wikihow = HELLASWAG | {"ctx_a": "[header] How to fix a roof [title] Climb. [step] Go up.", "ctx_b": ""}
    path = write(tmp_path / "hellaswag_val.jsonl", HELLASWAG, wikihow | {"label": "0", "ind": 25})
    first, second = language.read_hellaswag(path, None)
    assert first.prompt.text == "Roof shingle removal: A man is sitting on a roof. He"
    assert (first.options[3], first.correct) == ("starts pulling. Then stops.", 3)
    assert (second.key, second.correct) == ("25", 0)
    assert second.prompt.text == "Roof shingle removal: How to fix a roof. Climb. Go up."


def test_mmlu_of_a_file_has_no_examples(tmp_path: Path) -> None:
    by_letter = {"question": "Which?", "choices": ["a", "b"], "answer": "B"}
    first, second = language.read_mmlu(write(tmp_path / "test.jsonl", MMLU, by_letter), None)
    assert first.prompt.text == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert (first.options, first.correct, first.category) == (("0", "4", "2", "6"), 1, "abstract_algebra")
    assert (second.key, second.correct, second.category) == ("test:2", 1, "")


def test_mmlu_of_a_folder_shows_five_of_the_same_subject(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", MMLU)
    shown = [MMLU | {"question": f"Example {n}?", "answer": 3} for n in range(7)]
    write(tmp_path / "dev.jsonl", MMLU | {"subject": "anatomy", "question": "Bones?"}, *shown)
    (item,) = language.read_mmlu(tmp_path, None)
    _, *examples, question = (item.prompt.text or "").split("\n\n")
    assert [example.splitlines()[0] for example in examples] == [f"Example {n}?" for n in range(5)]
    assert all(example.endswith("\nAnswer: 6") for example in examples)
    assert question.endswith("\nAnswer:")


def test_agieval(tmp_path: Path) -> None:
    shared = {"passage": None, "answer": None, "other": None}
    lsat = shared | {
        "passage": "Eight students. ",
        "question": "Who?",
        "options": ["(A)Ann", "(B)Bob"],
        "label": "B",
    }
    physics = shared | {"question": "哪项正确？", "options": ["A．一", "B．二", "C．三"], "label": ["A", "C"]}
    spaced = physics | {"options": ["(A)一", "二", "(C)三"], "label": "A B"}
    one = physics | {"label": ["C"]}
    formula = shared | {"question": "Degree?", "options": None, "label": None, "answer": "30"}
    write(tmp_path / "lsat-ar.jsonl", lsat)
    write(tmp_path / "gaokao-physics.jsonl", physics, spaced, one)
    write(tmp_path / "math.jsonl", formula)
    several, others, single, ordered, maths = language.read_agieval(tmp_path, None)
    assert ordered.prompt.text == (
        "Eight students.Q: Who? Answer Choices: (A)Ann (B)Bob\nA: Among A through B, the answer is"
    )
    assert (ordered.options, ordered.correct, ordered.category) == (("Ann", "Bob"), 1, "lsat-ar")
    assert several.prompt.text == "问题：哪项正确？ 选项：(A)一 (B)二 (C)三\n答案：从A到C, 我们应选择"
    assert (several.options, several.correct, several.references) == ((), None, ("A", "C"))
    assert others.references == ("A", "B")
    assert "(A)(A)一" in (others.prompt.text or "")  # not all have their letters, so none is taken off
    assert (single.options, single.correct, single.references) == (("一", "二", "三"), 2, ())
    assert (maths.prompt.text, maths.references) == ("Q: Degree?\nA: The answer is", ("30",))


def test_agieval_leaves_out_what_has_no_label_and_says_so(tmp_path: Path) -> None:
    row = {"question": "?", "options": ["(A)x", "(B)y"], "label": ["B", "。"]}
    path = write(tmp_path / "jec-qa-kd.jsonl", row, row | {"label": []})
    with pytest.warns(UserWarning, match="jec-qa-kd.jsonl: 1 questions without a label are left out"):
        (item,) = language.read_agieval(path, None)
    assert item.correct == 1


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many eggs?", "answer": "16 - 3 = <<16-3=13>>13\n#### 1,013"}
    (item,) = language.read_gsm8k(write(tmp_path / "test.jsonl", row), None)
    assert (item.prompt.text, item.references) == ("Question: How many eggs?\nAnswer:", ("1,013",))
    grade = BENCHMARKS["gsm8k"].grade
    assert grade is not None
    assert (grade(item, "#### 1013"), grade(item, "#### 13")) == (1, 0)
    write(tmp_path / "train.jsonl", *({"question": f"Q{n}?", "answer": f"#### {n}"} for n in range(9)))
    (after_examples,) = language.read_gsm8k(tmp_path, None)
    assert (after_examples.prompt.text or "").count("Question:") == 8 + 1
    assert (after_examples.prompt.text or "").startswith("Question: Q0?\nAnswer: #### 0\n\nQuestion: Q1?")


def test_mbpp(tmp_path: Path) -> None:
    examples = [MBPP | {"task_id": n, "code": f"code {n}"} for n in (1, 2, 3, 4)]
    with_setup = MBPP | {"task_id": 510, "test_setup_code": "import math"}
    path = write(tmp_path / "mbpp.jsonl", *examples, MBPP, with_setup, MBPP | {"task_id": 511})
    first, last = language.read_mbpp(path, None)
    assert (first.key, first.references) == ("11", ("assert add(1, 2) == 3", "assert add(0, 0) == 0"))
    assert (last.key, last.references[0]) == ("510", "import math")
    assert [f"code {n}\n[DONE]" in (first.prompt.text or "") for n in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        True,
    ]
    assert (first.prompt.text or "").endswith("assert add(0, 0) == 0\n[BEGIN]\n")
    (alone,) = language.read_mbpp(write(tmp_path / "test.jsonl", MBPP), None)
    assert (alone.prompt.text or "").startswith(
        "You are an expert Python programmer, and here is your task: Write a"
    )


def test_texts_come_from_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Ein Käse.\n\n<image> is a tag.", encoding="utf-8")
    write(tmp_path / "a.jsonl", {"text": "one", "meta": {"pile_set_name": "ArXiv"}}, {"text": "two"})
    one, two, whole = language.read_texts(tmp_path, None)
    assert [(item.key, item.prompt.text, item.category) for item in (one, two)] == [
        ("a:1", "one", "ArXiv"),
        ("a:2", "two", ""),
    ]
    assert (whole.key, whole.prompt.num_images) == ("b:1", 0)
    assert (whole.prompt.text or "").startswith("Ein Käse.\n\n<")
    assert language.read_texts(tmp_path / "b.txt", None) == [whole]


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("hellaswag", HELLASWAG | {"label": ""}, "label is ''; it must be a whole number"),
        ("hellaswag", HELLASWAG | {"label": 4}, "label is 4; .*4 options, from 0"),
        ("mmlu", MMLU | {"answer": "E"}, "answer is 'E'; .* A, B, C, D"),
        ("mmlu", MMLU | {"choices": "none"}, "choices is 'none'"),
        ("mmlu", MMLU | {"question": "\ud800"}, "question holds a lone surrogate at character 0"),
        ("agieval", {"question": "?", "options": ["(A)x"], "label": "B"}, "label is 'B'; .*: A$"),
        (
            "agieval",
            {"question": "?", "options": ["(A)x"], "label": "x"},
            "label is 'x'; it must hold the letter",
        ),
        ("agieval", {"question": "?", "options": None, "label": None}, "no field 'answer'"),
        ("gsm8k", {"question": "?", "answer": "13"}, "answer does not end with ####"),
        ("mbpp", MBPP | {"test_list": []}, "test_list is '\\[\\]'; .*at least one"),
        ("text", {"text": "  "}, "text is '  '; it must be a text that is not blank"),
        ("text", {"content": "x"}, "no field 'text'; it has content"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, name: str, row: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"bad.jsonl, row 1: {complaint}"):
        BENCHMARKS[name].read(path, None)


def test_mbpp_without_its_test_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m.jsonl has no task_id from 11 to 510"):
        language.read_mbpp(write(tmp_path / "m.jsonl", MBPP | {"task_id": 601}), None)


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", MMLU)
    with pytest.raises(UserError, match=r"dev.jsonl does not exist; it must be a .jsonl file"):
        language.read_mmlu(tmp_path, None)
