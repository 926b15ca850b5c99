"""What generated answers are taken to say, and how benchmarks grade them. Expectations are written by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmarks import grading
from megatron_vl.evaluate.benchmarks.answers import (
    last_number,
    matches_math,
    matches_open,
    numbers,
    option_index,
    option_letters,
    says_no,
    whole_number,
)
from megatron_vl.evaluate.benchmarks.catalog import Grader
from megatron_vl.evaluate.items import Item

ANIMALS = ("a red cat", "the dog", "two birds", "no animal")
PHRASINGS = (
    "{}",
    " {} ",
    "({})",
    "{}.",
    "**{}**",
    "{}. {text}",
    "({}) {text}",
    "{}: {text}, I think",
    "{}\n\nBecause I can see it.",
    "The answer is {}.",
    "The answer is ({}).",
    "The correct answer is: {}",
    "Answer: {}",
    "answer is **{}**",
    "I would choose option {}.",
    "After looking at A picture of Dogs, the answer is ({}).",
    "{} is the correct answer.",
    "It must be ({}), since nothing else fits.",
    "答案是{}。",
    "选{}",
    "正确选项为：{}",
    "{text}",
    "{text}.",
    "I can see {text} here.",
)


def item(**fields: object) -> Item:
    return Item(key="1", prompt=Sample(text="?"), **fields)


@pytest.mark.parametrize("phrasing", PHRASINGS)
@pytest.mark.parametrize("index", range(4))
def test_any_option_in_any_phrasing_is_found(phrasing: str, index: int) -> None:
    assert option_index(phrasing.format("ABCD"[index], text=ANIMALS[index]), ANIMALS) == index


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat sits here.",
        "I do not know.",
        "E",
        "Both (E) and (F)",
        "Apples",
        "THE DOGMA",
        "B or C",
        "A or B",
        "?",
    ],
)
def test_what_names_no_option_is_none(text: str) -> None:
    assert option_index(text, ANIMALS) is None


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B) since A and C are wrong", 1),
        ("B and C seem near, so the answer is C", 2),
        ("A and B are close, but B is correct", 1),
        ("A and B fail, which leaves (C)", 2),
        ("a red cat and two birds", None),
    ],
)
def test_the_surest_phrasing_decides(text: str, index: int | None) -> None:
    assert option_index(text, ANIMALS) == index


def test_an_option_that_contains_another_is_found() -> None:
    assert option_index("the dog", ("dog", "the dog", "the dogs")) == 1


def test_a_letter_goes_before_an_option_that_is_a_letter() -> None:
    assert option_index("A", ("C", "A", "B")) == 0


def test_a_number_among_the_options_is_no_part_of_a_longer_one() -> None:
    assert option_index("there are 10", ("1", "10", "0")) == 1


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_any_text_gives_an_option_or_none(text: str, options: list[str]) -> None:
    index = option_index(text, options)
    assert index is None or 0 <= index < len(options)


@pytest.mark.parametrize(
    "text",
    [
        "ACD",
        "A, C and D",
        "答案是ACD",
        "应选A、C、D。",
        "(the answers are A,C,D)",
        "A C D\nB is wrong",
        "B fails, so the answer is ACD",
    ],
)
def test_several_letters_are_found(text: str) -> None:
    assert option_letters(text) == {"A", "C", "D"}


@pytest.mark.parametrize(("text", "letters"), [("", ""), ("none of them", ""), ("B\nCats purr", "B")])
def test_fewer_letters_are_found(text: str, letters: str) -> None:
    assert option_letters(text) == set(letters)


def test_many_separators_do_not_take_forever() -> None:
    assert option_letters("A" + ", " * 200 + "x") == {"A"}


@pytest.mark.parametrize(
    ("text", "is_no"),
    [
        ("No", True),
        ("no.", True),
        ("There is not a dog", True),
        ("NO!", True),
        ("Yes", False),
        ("Yes. No doubt", False),
        ("Nothing", False),
        ("", False),
    ],
)
def test_no_is_looked_for_in_the_first_sentence(text: str, is_no: bool) -> None:
    assert says_no(text) == is_no


@given(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{}", "it is {}.", "= ${}", "#### {}"])
)
def test_any_float_is_read_back(number: float, phrasing: str) -> None:
    assert last_number(phrasing.format(repr(number))) == number


@given(st.integers(-(10**12), 10**12))
def test_thousands_may_be_set_off(number: int) -> None:
    assert numbers(f"{number:,} of {number}") == [number, number]
    assert whole_number(f" {number:,} ") == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3-5 and 1,234.5", [3, 5, 1234.5]),
        ("x = -2, y=−.5", [-2, -0.5]),
        ("1,2,3", [1, 2, 3]),
        ("in 2024, 12,34", [2024, 12, 34]),
        ("$1,000,000.", [1_000_000]),
        ("none", []),
    ],
)
def test_numbers_in_a_text(text: str, found: list[float]) -> None:
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The total is 24.", "24", True),
        ("So the value is 3.14159", "3.14", True),
        ("x = 1,000", "1000", True),
        ("It is 240", "24", False),
        ("24 is a nice number, so 25", "24", False),
        ("The structure shown is the Golgi Apparatus.", "golgi apparatus", True),
        ("v", "V", True),
        ("the answer is velocity", "v", False),
    ],
)
def test_open_answers(text: str, reference: str, right: bool) -> None:
    assert matches_open(text, reference) == right


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", True),
        ("$x = \\dfrac12$", "\\frac12", True),
        ("the answer is 30.0", "30", True),
        ("\\left(3, 4\\right]", "(3,4]", True),
        ("$5$;$10$", "$5$;$10$", True),
        ("30\nbut maybe 31", "30", True),
        ("\\boxed{30} or 31", "31", False),
        ("31", "30", False),
        ("", "30", False),
    ],
)
def test_formulas(text: str, reference: str, right: bool) -> None:
    assert matches_math(text, reference) == right


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("She has 16 - 3 = 13.\n#### 13", 1),
        ("#### 13\n\nQuestion: Next?\nAnswer: #### 99", 1),
        ("#### 13\n#### 14", 1),
        ("It is 13.\nQuestion: Next?\nAnswer: 99", 1),
        ("It makes $1,013, no: 13 dollars.", 1),
        ("13 apples, of which 2 are bad", 0),
        ("#### 14", 0),
        ("no idea", 0),
    ],
)
def test_gsm8k_takes_the_marked_number_or_the_last(text: str, score: float) -> None:
    assert grading.grade_gsm8k(item(references=("13",)), text) == score


@pytest.mark.parametrize(
    ("text", "category", "score"),
    [
        ("The sign says CENTRE\nstreet.", "Scene Text-centric VQA", 1),
        ("center", "Scene Text-centric VQA", 0),
        ("c e n t r e street", "Handwritten Mathematical Expression Recognition", 1),
        ("Centre Street", "Handwritten Mathematical Expression Recognition", 0),
    ],
)
def test_ocrbench_looks_for_what_is_contained(text: str, category: str, score: float) -> None:
    assert (
        grading.grade_contained(item(references=("x x", "centre street"), category=category), text) == score
    )


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("The answer is 12.", "12", 1),
        ("12.7", "12", 1),
        ("13", "12", 0),
        ("about 1.249", "1.2", 1),
        ("1.26", "1.2", 0),
        ("0.53", "0.50", 0),
        ("It spans [1, 2].", "[1,2]", 1),
        ("[1, 3]", "[1,2]", 0),
        ("1 and 2", "[1,2]", 0),
        ("9" * 400, "12", 0),
        ("", "12", 0),
    ],
)
def test_mathvista_rounds_as_the_reference_does(text: str, reference: str, score: float) -> None:
    assert grading.grade_mathvista(item(references=(reference,)), text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [("错误", 1), ("不对。", 1), ("这个说法不正确", 1), ("对", 0), ("正确", 0), ("对或错", 0), ("", 0)],
)
def test_cmmmu_reads_judgements(text: str, score: float) -> None:
    assert grading.grade_cmmmu(item(options=("对", "错"), correct=1), text) == score


@pytest.mark.parametrize(
    ("grade", "text", "score"),
    [
        (grading.grade_cmmmu, "A和C", 1),
        (grading.grade_cmmmu, "A", 0),
        (grading.grade_agieval, "ABC", 0),
        (grading.grade_agieval, "AC\n问题：B", 1),
    ],
)
def test_all_right_letters_and_no_other_count(grade: Grader, text: str, score: float) -> None:
    assert grade(item(references=("A", "C")), text) == score


def test_graders_tell_options_from_free_answers() -> None:
    choice, free = item(options=("cat", "dog"), correct=1), item(references=("7", "seven"))
    assert [
        grade(choice, "B") for grade in (grading.grade_open, grading.grade_cmmmu, grading.grade_agieval)
    ] == [1] * 3
    assert grading.grade_mathvista(choice, "A") == 0
    assert [grading.grade_open(free, text) for text in ("is seven", "7.0", "8")] == [1, 1, 0]
    assert grading.grade_agieval(item(references=("7",)), "7\nQ: 8?") == 1
    assert grading.grade_agieval(item(references=("7",)), "8\nQ: 9?\nA: The answer is 7") == 0
    assert grading.grade_choice(item(), "nothing") == 0


@pytest.mark.parametrize(
    ("text", "scores"), [("No, there is none", [0, 1]), ("Yes", [1, 0]), ("maybe", [1, 0])]
)
def test_pope_takes_all_but_a_no_for_a_yes(text: str, scores: list[float]) -> None:
    of_yes, of_no = (item(options=("Yes", "No"), correct=correct) for correct in (0, 1))
    assert [grading.grade_yes_no(of_yes, text), grading.grade_yes_no(of_no, text)] == scores
