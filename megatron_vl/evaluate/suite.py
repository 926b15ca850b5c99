"""The benchmarks that a configuration names: read once, run with any model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import BenchmarkConfig
from megatron_vl.evaluate.benchmark import BenchmarkResult, run_benchmark
from megatron_vl.evaluate.benchmarks.catalog import Benchmark, Method, find_benchmark
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import Item


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


def run_suite(tasks: Sequence[Task], evaluator: Evaluator) -> Iterator[BenchmarkResult]:
    """Run one benchmark after the other. Collective over the world."""
    for task in tasks:
        yield run_benchmark(task.name, task.benchmark, task.items, evaluator, task.normalization)


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
