"""A benchmark's result from what an evaluator says, which these tests make up."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmark import ItemRecord, run_benchmark
from megatron_vl.evaluate.benchmarks.catalog import Benchmark
from megatron_vl.evaluate.evaluator import Choice, TextBits
from megatron_vl.evaluate.items import Item
from tests.support.ranks import run_ranks

ITEMS = [
    Item(key="1", prompt=Sample(text="one"), options=("a", "b"), correct=0, category="x"),
    Item(key="2", prompt=Sample(text="two"), options=("a", "b"), correct=0, category="y"),
    Item(key="3", prompt=Sample(text="three"), options=("a", "b"), correct=1, category="x"),
]


class Answers:
    """In place of an evaluator."""

    def choose(self, items: Sequence[Item], normalization: str) -> list[Choice]:
        assert normalization == "bytes"
        return [
            Choice(scores=(1.0, 2.0), chosen=0),
            Choice(scores=(2.0, 1.0), chosen=1),
            Choice(scores=(2.0, 1.0), chosen=1),
        ]

    def generate(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        return [f"{item.key} in {max_new_tokens}" for item in items]

    def bits_per_byte(self, items: Sequence[Item]) -> list[TextBits]:
        return [
            TextBits(bits=6.0, num_bytes=3),
            TextBits(bits=3.0, num_bytes=3),
            TextBits(bits=4.0, num_bytes=5),
        ]


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def read_nothing(path: Path, images: Path | None) -> list[Item]:
    return []


def run(items: Sequence[Item] = ITEMS, **fields: Any) -> Any:
    benchmark = Benchmark(read=read_nothing, **fields)
    return run_benchmark("made up", benchmark, items, Answers(), "bytes")


def test_a_choice_is_right_or_wrong() -> None:
    result = run(method="choice")
    assert [record.score for record in result.records] == [1.0, 0.0, 1.0]
    assert result.records[1] == ItemRecord(
        key="2", category="y", score=0.0, answer="b", option_scores=(2.0, 1.0)
    )
    assert result.metrics == {"accuracy": pytest.approx(2 / 3), "accuracy/x": 1.0, "accuracy/y": 0.0}
    assert (result.benchmark, result.method) == ("made up", "choice")


def test_a_generated_answer_has_its_grade() -> None:
    result = run(method="generate", max_new_tokens=7, grade=lambda item, text: int(item.key) / 4)
    assert [record.answer for record in result.records] == ["1 in 7", "2 in 7", "3 in 7"]
    assert [record.score for record in result.records] == [0.25, 0.5, 0.75]
    assert result.metrics == {"accuracy": 0.5, "accuracy/x": 0.5, "accuracy/y": 0.5}


def test_without_a_grader_there_are_answers_alone() -> None:
    result = run(method="generate", grade=None)
    assert result.metrics == {}
    assert [record.score for record in result.records] == [None, None, None]
    assert result.records[0].answer


def test_bits_per_byte_weigh_texts_by_their_bytes() -> None:
    result = run(method="bits_per_byte")
    assert result.metrics == {
        "bits_per_byte": 13 / 11,
        "bits_per_byte/x": 10 / 8,
        "bits_per_byte/y": 1.0,
    }
    assert [record.score for record in result.records] == [2.0, 1.0, 0.8]


def test_what_cannot_be_run_is_told() -> None:
    with pytest.raises(UserError, match="made up has no items"):
        run([])
    with pytest.raises(UserError, match="item '4' does not say which option is right"):
        run([*ITEMS, Item(key="4", prompt=Sample(text="four"), options=("a",))], method="choice")


def test_a_grader_that_fails_is_told() -> None:
    def fail(item: Item, text: str) -> float:
        raise OSError("no process")

    with pytest.raises(RuntimeError, match="could not be graded: OSError: no process"):
        run(method="generate", grade=fail)


def grade_and_count() -> tuple[Any, list[str]]:
    """The result, and the answers that this rank has graded."""
    graded: list[str] = []

    def grade(item: Item, text: str) -> float:
        graded.append(text)
        return float(dist.get_rank())

    return run(method="generate", max_new_tokens=7, grade=grade), graded


def test_answers_are_graded_once_for_all_ranks() -> None:
    (first, graded), (second, graded_again) = run_ranks(2, grade_and_count)
    assert first == second
    assert [record.score for record in first.records] == [0.0, 0.0, 0.0]
    assert graded == ["1 in 7", "2 in 7", "3 in 7"] and graded_again == []
