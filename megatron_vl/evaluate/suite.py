"""The benchmarks that a configuration names: read once, run with any model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import BenchmarkConfig
from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.benchmark import BenchmarkResult, run_benchmark
from megatron_vl.evaluate.benchmarks.catalog import Benchmark, Method, find_benchmark
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import Item
from megatron_vl.evaluate.sequences import choices_of, prompts_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark, ready to run. `num_left_out`: items without options, which the choice method cannot score."""

    name: str
    benchmark: Benchmark
    items: list[Item]
    normalization: str
    num_left_out: int


def load_suite(benchmarks: Mapping[str, BenchmarkConfig], execute_code: bool) -> list[Task]:
    """Read all benchmarks.

    Raises:
        UserError: a file is not in the benchmark's layout, or an image is missing.
    """
    return [_load(name, config, execute_code) for name, config in benchmarks.items()]


def check_items(tasks: Sequence[Task], content: ContentRule, sequence_length: int) -> None:
    """What `run_suite` would say of an item, before the hours of training that may come first.

    Raises:
        UserError: an item does not fit a row, or has an image that is none by its header.
    """
    for task in tasks:
        with _of_benchmark(task.name):
            if task.benchmark.method == "choice":
                choices_of(task.items, content, sequence_length)
            elif task.benchmark.method == "generate":
                prompts_of(task.items, content, task.benchmark.max_new_tokens, sequence_length)


def run_suite(tasks: Sequence[Task], evaluator: Evaluator) -> Iterator[BenchmarkResult]:
    """Run one benchmark after the other. Collective over the world. Raises UserError where an item cannot be used."""
    for task in tasks:
        with _of_benchmark(task.name):
            result = run_benchmark(task.name, task.benchmark, task.items, evaluator, task.normalization)
        yield result


@contextmanager
def _of_benchmark(name: str) -> Iterator[None]:
    """An item's key alone does not say whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluation.benchmarks.{name}: {error}") from error


def _load(name: str, config: BenchmarkConfig, execute_code: bool) -> Task:
    benchmark = find_benchmark(config.format, execute_code=execute_code)
    if config.method is not None:
        benchmark = replace(benchmark, method=cast(Method, config.method))
    if config.max_new_tokens is not None:
        benchmark = replace(benchmark, max_new_tokens=config.max_new_tokens)
    items = benchmark.read(Path(config.path), None if config.images is None else Path(config.images))
    suitable = [item for item in items if item.options] if benchmark.method == "choice" else items
    if not suitable:
        raise UserError(
            f"evaluation.benchmarks.{name}: none of the {len(items)} items of {config.path} can be scored by "
            f"{benchmark.method}"
        )
    return Task(
        name=name,
        benchmark=benchmark,
        items=suitable[: config.max_items],
        normalization=config.normalization,
        num_left_out=len(items) - len(suitable),
    )
