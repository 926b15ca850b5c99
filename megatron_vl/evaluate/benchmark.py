"""Runs one benchmark with a model: every item answered, scored, and summed up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.device.trail import TRAIL
from megatron_vl.evaluate.benchmarks.catalog import Benchmark
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import Item


@dataclass(frozen=True, kw_only=True)
class ItemRecord:
    """What came of one item. `score` is 0 … 1, or the bits per byte of a text; None where nobody has graded yet.

    `answer` is the text generated or the option chosen; `option_scores` are the options' normalised negative
    log-likelihoods in nats.
    """

    key: str
    category: str
    score: float | None
    answer: str = ""
    option_scores: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """`metrics` are overall (NAME) and by category (NAME/CATEGORY); empty where the grading happens elsewhere."""

    benchmark: str
    method: str
    metrics: dict[str, float]
    records: list[ItemRecord]


def run_benchmark(
    name: str,
    benchmark: Benchmark,
    items: Sequence[Item],
    evaluator: Evaluator,
    normalization: str = "tokens",
) -> BenchmarkResult:
    """Answer and score the items by `benchmark.method`. Collective over the world; the same result on all ranks.

    Generated answers are graded on the first rank alone: a grader may run programs.

    Raises:
        UserError: there are no items, or one does not suit the method, does not fit a row or has a broken image.
    """
    if not items:
        raise UserError(f"benchmark {name} has no items; it must have at least one")
    if benchmark.method == "choice":
        records = _choose(items, evaluator, normalization)
    elif benchmark.method == "bits_per_byte":
        return _weigh_texts(name, items, evaluator)
    else:
        records = _generate(items, evaluator, benchmark)
    scores = [record.score for record in records if record.score is not None]
    metrics = benchmark.aggregate(items, scores) if scores else {}
    return BenchmarkResult(benchmark=name, method=benchmark.method, metrics=metrics, records=records)


def _choose(items: Sequence[Item], evaluator: Evaluator, normalization: str) -> list[ItemRecord]:
    for item in items:
        if item.correct is None:
            raise UserError(
                f"item {item.key!r} does not say which option is right; a choice is scored by that"
            )
    choices = evaluator.choose(items, normalization)
    return [
        ItemRecord(
            key=item.key,
            category=item.category,
            score=float(choice.chosen == item.correct),
            answer=item.options[choice.chosen],
            option_scores=choice.scores,
        )
        for item, choice in zip(items, choices, strict=True)
    ]


def _generate(items: Sequence[Item], evaluator: Evaluator, benchmark: Benchmark) -> list[ItemRecord]:
    answers, grade = evaluator.generate(items, benchmark.max_new_tokens), benchmark.grade
    scores: Sequence[float | None] = [None] * len(items)
    if grade is not None:
        pairs = zip(items, answers, strict=True)  # one by one: each may take as long as code that is run
        scores = [_from_first_rank(partial(grade, *pair), number) for number, pair in enumerate(pairs, 1)]
    return [
        ItemRecord(key=item.key, category=item.category, score=score, answer=answer)
        for item, answer, score in zip(items, answers, scores, strict=True)
    ]


def _weigh_texts(name: str, items: Sequence[Item], evaluator: Evaluator) -> BenchmarkResult:
    """Bits per byte of all texts together, and of each category's."""
    texts = evaluator.bits_per_byte(items)
    groups = {"bits_per_byte": texts}
    for item, text in zip(items, texts, strict=True):
        if item.category:
            groups.setdefault(f"bits_per_byte/{item.category}", []).append(text)
    records = [
        ItemRecord(key=item.key, category=item.category, score=text.bits / text.num_bytes)
        for item, text in zip(items, texts, strict=True)
    ]
    return BenchmarkResult(
        benchmark=name,
        method="bits_per_byte",
        metrics={
            metric: sum(text.bits for text in group) / sum(text.num_bytes for text in group)
            for metric, group in groups.items()
        },
        records=records,
    )


def _from_first_rank(make: Callable[[], float | None], number: int) -> float | None:
    """What `make` returns on rank 0, on all ranks; RuntimeError where it raises. Collective over the world."""
    TRAIL.at("grading", number)
    made: list[tuple[float | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            made = [(make(), "")]
        except Exception as error:  # whatever it is, the others must not wait for ever
            made = [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(made)
    score, error_message = made[0]
    if error_message:
        raise RuntimeError(f"answer {number} could not be graded: {error_message}")
    return score
