"""Metrics of hand-counted results."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmarks import metrics
from megatron_vl.evaluate.benchmarks.catalog import BENCHMARKS, find_benchmark
from megatron_vl.evaluate.items import Item


def make_item(key: str = "1", correct: int | None = None, category: str = "") -> Item:
    return Item(key=key, prompt=Sample(text="?"), correct=correct, category=category)


def test_accuracy_is_also_given_by_category() -> None:
    items = [make_item(category=name) for name in ("ocr", "ocr", "ocr", "math")]
    assert metrics.accuracy(items, [1, 0, 1, 0]) == {
        "accuracy": 0.5,
        "accuracy/ocr": pytest.approx(2 / 3),
        "accuracy/math": 0,
    }


def test_a_question_counts_only_if_all_its_copies_are_right() -> None:
    items = [make_item(key) for key in ("7", "8", "1000007", "2000007", "1000008")]
    found = metrics.circular_accuracy(items, [1, 1, 1, 0, 1])
    assert (found["circular_accuracy"], found["accuracy"]) == (0.5, 0.8)


def test_ocrbench_counts_right_answers() -> None:
    items = [make_item(category=name) for name in ("a", "a", "b")]
    assert metrics.total_score(items, [1, 1, 1]) == {"score": 3, "score/a": 2, "score/b": 1}


def test_pope_of_a_small_table() -> None:
    # label, said: yes yes, yes no, yes yes, no yes, no no  ->  2 true positives, 1 false, 1 missed
    items = [make_item(correct=correct, category="random") for correct in (0, 0, 0, 1, 1)]
    found = metrics.yes_no(items, [1, 0, 1, 0, 1])
    expected = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    assert found == {
        name + suffix: pytest.approx(value) for name, value in expected.items() for suffix in ("", "/random")
    }


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_pope_by_counting(pairs: list[tuple[bool, bool]]) -> None:
    items = [make_item(correct=0 if label else 1) for label, _ in pairs]
    found = metrics.yes_no(items, [float(label == said) for label, said in pairs])
    counted = {pair: pairs.count(pair) for pair in ((True, True), (True, False), (False, True))}
    hits, missed, false = counted.values()
    assert found["f1"] == pytest.approx(2 * hits / (2 * hits + missed + false) if hits else 0)
    assert found["yes_ratio"] == pytest.approx(sum(said for _, said in pairs) / len(pairs))


def test_programs_are_graded_only_when_told() -> None:
    assert BENCHMARKS["mbpp"].grade is None
    assert find_benchmark("mbpp").grade is None
    assert find_benchmark("mbpp", execute_code=True).grade is not None
    assert find_benchmark("mm_vet", execute_code=True).grade is None


def test_an_unknown_benchmark_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"'mmbnch'; valid: mmbench, mmbench_cn, .*gsm8k"):
        find_benchmark("mmbnch")


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.grade])
def test_the_main_metric_is_one_that_is_computed(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.metric in benchmark.aggregate([make_item(correct=0)], [1.0])
