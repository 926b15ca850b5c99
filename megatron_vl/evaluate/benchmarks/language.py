"""Readers of benchmarks over text: HellaSwag, MMLU, AGIEval, GSM8K, MBPP, and plain text.

Their prompts are documents, which the answer continues. `images` is not used. All raise UserError for whatever
is missing, broken or too large.
"""

import re
import warnings
from itertools import groupby
from pathlib import Path

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmarks.answers import numbers
from megatron_vl.evaluate.benchmarks.files import Row, data_files, read_bounded, read_rows
from megatron_vl.evaluate.benchmarks.questions import (
    LETTERS,
    check_index,
    letter_index,
    lettered,
    to_index,
)
from megatron_vl.evaluate.items import Item

MAX_DOCUMENT_BYTES = 64 << 20
MMLU_SHOTS = 5
GSM8K_SHOTS = 8
MBPP_SHOTS = (2, 3, 4)  # task ids, as in the benchmark's paper
MBPP_TEST = range(11, 511)  # task ids

_AGIEVAL_CHINESE = re.compile(r"gaokao-(?!english).+|jec-qa-.+|logiqa-zh")


def read_hellaswag(path: Path, images: Path | None) -> list[Item]:
    """HellaSwag's hellaswag_val.jsonl (rowanz/hellaswag): activity_label, ctx_a, ctx_b, endings, label, ind.

    Prompt: lm-evaluation-harness's, i.e. activity and context without the marks in brackets that WikiHow's part
    has. The endings are compared.
    """
    items = []
    for row in read_rows(path, ".jsonl"):
        endings = tuple(_without_brackets(ending) for ending in row.texts("endings"))
        second = row.optional_text("ctx_b")
        context = f"{row.optional_text('ctx_a')} {second[:1].upper()}{second[1:]}"
        items.append(
            Item(
                key=row.text("ind"),
                prompt=Sample(text=_without_brackets(f"{row.text('activity_label')}: {context}")),
                options=endings,
                correct=check_index(row, "label", len(endings)),
                category=row.optional_text("split_type"),
            )
        )
    return items


def read_mmlu(path: Path, images: Path | None) -> list[Item]:
    """MMLU as lines of JSON with the fields of cais/mmlu: question, choices, answer (index or letter), subject.

    Prompt: lm-evaluation-harness's, i.e. a line about the subject, question, lettered choices, "Answer:"; after
    it the choices' texts are compared. A file is asked without examples. In a folder, test.jsonl is asked, each
    question after the first 5 of its subject in dev.jsonl.
    """
    questions, examples = _with_examples(path, "dev.jsonl")
    shown: dict[str, list[str]] = {}
    for row in examples:
        choices, correct = _mmlu_choices(row)
        of_subject = shown.setdefault(row.optional_text("subject"), [])
        of_subject.append(f"{_mmlu_question(row, choices)} {choices[correct]}")
    items = []
    for row in questions:
        choices, correct = _mmlu_choices(row)
        subject = row.optional_text("subject")
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        header = f"The following are multiple choice questions (with answers){about}."
        parts = [header, *shown.get(subject, [])[:MMLU_SHOTS], _mmlu_question(row, choices)]
        items.append(
            Item(
                key=f"{row.path.stem}:{row.number}",
                prompt=Sample(text="\n\n".join(parts)),
                options=choices,
                correct=correct,
                category=subject,
            )
        )
    return items


def read_agieval(path: Path, images: Path | None) -> list[Item]:
    """AGIEval's data/v1/*.jsonl (ruixiangcui/AGIEval), one file or a folder: passage, question, options, label, answer.

    An option begins with its letter ("(A)…", "A．…"), which is taken off. label is a letter, or several, as a
    list or in a string; such a question has the letters as references instead of options. Without options,
    `answer` is a formula. Prompt: the official one without examples, in the language of the file, which its name
    tells. The category is the file's name. Questions whose list of labels is empty (jec-qa-kd has one) are left out,
    and a warning says how many.
    """
    items, num_unlabelled = [], 0
    for row in read_rows(path, ".jsonl"):
        name = row.path.stem
        is_chinese = _AGIEVAL_CHINESE.fullmatch(name) is not None
        options = _without_letters(row.texts("options")) if row.fields.get("options") else ()
        correct = [to_index(row, "label", letter, len(options)) for letter in _labels(row)] if options else []
        if options and not correct:
            num_unlabelled += 1
            continue
        several = tuple(LETTERS[index] for index in correct) if len(correct) > 1 else ()
        items.append(
            Item(
                key=f"{name}:{row.number}",
                prompt=Sample(text=_agieval_prompt(row, options, is_chinese)),
                options=options if len(correct) == 1 else (),
                correct=correct[0] if len(correct) == 1 else None,
                references=several if options else (row.text("answer"),),
                category=name,
            )
        )
    if num_unlabelled:
        warnings.warn(f"{path}: {num_unlabelled} questions without a label are left out", stacklevel=2)
    return items


def read_gsm8k(path: Path, images: Path | None) -> list[Item]:
    """GSM8K's test.jsonl (openai/grade-school-math): question, answer, which ends with "#### NUMBER".

    Prompt: lm-evaluation-harness's "Question: … Answer:". A file is asked without examples; in a folder,
    test.jsonl is asked after the first 8 of train.jsonl.
    """
    questions, examples = _with_examples(path, "train.jsonl")
    shown = [
        f"Question: {row.text('question')}\nAnswer: {row.text('answer')}" for row in examples[:GSM8K_SHOTS]
    ]
    items = []
    for row in questions:
        found = numbers(row.text("answer").partition("####")[2])
        if len(found) != 1:
            raise row.error("answer does not end with #### and one number")
        items.append(
            Item(
                key=f"{row.path.stem}:{row.number}",
                prompt=Sample(text="\n\n".join([*shown, f"Question: {row.text('question')}\nAnswer:"])),
                references=(row.text("answer").partition("####")[2].strip(),),
            )
        )
    return items


def read_mbpp(path: Path, images: Path | None) -> list[Item]:
    """MBPP's mbpp.jsonl (google-research/google-research): task_id, text, code, test_list, test_setup_code.

    The tasks 11 to 510 are its test. Prompt: the paper's; where the file has the tasks 2, 3 and 4, they are the
    examples. The references are the setup code and the asserts.
    """
    rows = {row.integer("task_id"): row for row in read_rows(path, ".jsonl")}
    shown = [f"{_mbpp_question(rows[n])}{rows[n].text('code')}\n[DONE]\n\n" for n in MBPP_SHOTS if n in rows]
    asked = [(number, row) for number, row in rows.items() if number in MBPP_TEST]
    if not asked:
        raise UserError(f"{path} has no task_id from {MBPP_TEST.start} to {MBPP_TEST.stop - 1}, MBPP's test")
    items = []
    for number, row in asked:
        setup = row.optional_text("test_setup_code")
        items.append(
            Item(
                key=str(number),
                prompt=Sample(text="".join([*shown, _mbpp_question(row)])),
                references=(*([setup] if setup else []), *row.texts("test_list")),
            )
        )
    return items


def read_texts(path: Path, images: Path | None) -> list[Item]:
    """Documents whose bits are counted: a .txt or .md file is one; a line of .jsonl has one in "text" (the Pile).

    The category is a line's meta.pile_set_name. A folder stands for all such files in it.
    """
    items = []
    for suffix, files in groupby(data_files(path, ".txt", ".md", ".jsonl"), key=lambda file: file.suffix):
        for file in files:
            rows = read_rows(file, ".jsonl") if suffix == ".jsonl" else [_text_file(file)]
            items += [_document(row) for row in rows]
    return items


def _with_examples(path: Path, examples: str) -> tuple[list[Row], list[Row]]:
    """The rows that are asked, and those that are shown before them."""
    if not path.is_dir():
        return list(read_rows(path, ".jsonl")), []
    return list(read_rows(path / "test.jsonl", ".jsonl")), list(read_rows(path / examples, ".jsonl"))


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()


def _mmlu_choices(row: Row) -> tuple[tuple[str, ...], int]:
    choices = row.texts("choices")
    is_letter = isinstance(row.raw("answer"), str) and not row.text("answer").isdigit()
    find = letter_index if is_letter else check_index
    return choices, find(row, "answer", len(choices))


def _mmlu_question(row: Row, choices: tuple[str, ...]) -> str:
    return f"{row.text('question')}\n{lettered(choices)}\nAnswer:"


def _without_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options as they are where not all of them begin with their own letter, as some do in the files."""
    prefixed = [
        re.match(rf"[(（]?{letter}[)）.．、,:：?\s]\s*", option)
        for letter, option in zip(LETTERS, options, strict=False)
    ]
    if not all(prefixed):
        return options
    return tuple(option[match.end() :] for option, match in zip(options, prefixed, strict=True) if match)


def _labels(row: Row) -> list[str]:
    """The letters of a label, which the files also write as "A B D" or with a stray stop; none for an empty list."""
    label = row.raw("label")
    if label == []:
        return []
    letters = re.findall(
        "[A-Z]", "".join(row.texts("label")) if isinstance(label, list) else row.text("label")
    )
    if not letters:
        raise row.error(f"label is {label!r}; it must hold the letter of an option")
    return letters


def _agieval_prompt(row: Row, options: tuple[str, ...], is_chinese: bool) -> str:
    passage, question = row.optional_text("passage"), row.text("question")
    choices, last = lettered(options, "({}){}", " "), LETTERS[len(options) - 1]
    if is_chinese:
        asked = f"{passage}问题：{question}"
        return f"{asked} 选项：{choices}\n答案：从A到{last}, 我们应选择" if options else f"{asked}\n答案："
    asked = f"{passage}Q: {question}"
    if options:
        return f"{asked} Answer Choices: {choices}\nA: Among A through {last}, the answer is"
    return f"{asked}\nA: The answer is"


def _mbpp_question(row: Row) -> str:
    tests = "\n".join(row.texts("test_list"))
    return (
        f"You are an expert Python programmer, and here is your task: {row.text('text')} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _text_file(path: Path) -> Row:
    try:
        return Row({"text": read_bounded(path, MAX_DOCUMENT_BYTES).decode()}, path, 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from error


def _document(row: Row) -> Item:
    text = row.text("text")
    if len(text.encode()) > MAX_DOCUMENT_BYTES:
        raise row.error(f"text has {len(text.encode())} bytes; a document has at most {MAX_DOCUMENT_BYTES}")
    meta = row.fields.get("meta")
    category = meta.get("pile_set_name", "") if isinstance(meta, dict) else ""
    return Item(key=f"{row.path.stem}:{row.number}", prompt=Sample(text=text), category=str(category))
