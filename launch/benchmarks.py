"""One rank of an evaluation: run the benchmarks, write and show what came out."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.model import open_evaluator
from megatron_vl.checkpoint.description import Description
from megatron_vl.config.evaluate import EvaluateConfig
from megatron_vl.device.process_group import destroy_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.benchmark import BenchmarkResult
from megatron_vl.evaluate.progress import SuiteProgress
from megatron_vl.evaluate.suite import Task, load_suite, run_suite
from megatron_vl.evaluate.suite_check import check_suite
from megatron_vl.train.environment import current_commit, environment_versions
from megatron_vl.train.metrics import finite
from megatron_vl.train.run_dir import RunDirectory, write_atomically
from megatron_vl.train.tracking import open_trackers

RESULTS = "results.json"


def run_benchmarks(
    config: EvaluateConfig, description: Description, environment: RankEnvironment, run: RunDirectory
) -> int:
    """Run them all; rank 0 writes each result when it is there. Returns the exit status."""
    tasks = load_suite(check_suite(config.evaluation), config.evaluation.execute_code)
    writes = environment.rank == 0
    if writes:
        _clear(run)
    results: list[BenchmarkResult] = []
    with SuiteProgress(tasks, Console(quiet=not (writes and config.tracking.progress))) as progress:
        evaluator = open_evaluator(config, description, environment, progress.update)
        for task, result in zip(tasks, run_suite(tasks, evaluator), strict=True):
            results.append(result)
            progress.end_benchmark()
            if writes:
                print(
                    f"{result.benchmark}: {len(result.records)} items by {result.method}{_left_out(task)}",
                    flush=True,
                )
                _write(run, config, results, complete=len(results) == len(tasks))
    if writes:
        _track(run, config, results)
        _show(results, run.path / RESULTS)
    destroy_distributed()
    return 0


def _left_out(task: Task) -> str:
    return f", {task.num_left_out} without options left out" if task.num_left_out else ""


def _clear(run: RunDirectory) -> None:
    """Drop what an earlier evaluation left here: another checkpoint's answers would look like this one's."""
    (run.path / RESULTS).unlink(missing_ok=True)
    shutil.rmtree(run.path / "answers", ignore_errors=True)


def _write(run: RunDirectory, config: EvaluateConfig, results: list[BenchmarkResult], complete: bool) -> None:
    """results.json with all metrics so far, and answers/NAME.jsonl with the last benchmark's items."""
    last = results[-1]
    answers = run.path / "answers"
    answers.mkdir(exist_ok=True)
    lines = [json.dumps(finite(asdict(record)), ensure_ascii=False) for record in last.records]
    write_atomically(answers / f"{last.benchmark}.jsonl", "".join(f"{line}\n" for line in lines))
    if not last.metrics:  # to be graded elsewhere: the official graders take answers by key
        by_key = {record.key: record.answer for record in last.records}
        write_atomically(
            answers / f"{last.benchmark}.json", json.dumps(by_key, ensure_ascii=False, indent=1) + "\n"
        )
    document: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "complete": complete,
        "commit": current_commit(),
        "environment": dict(environment_versions()),
        "config": asdict(config),
        "benchmarks": {
            result.benchmark: {
                "method": result.method,
                "num_items": len(result.records),
                "metrics": result.metrics,
            }
            for result in results
        },
    }
    write_atomically(run.path / RESULTS, json.dumps(finite(document), ensure_ascii=False, indent=1) + "\n")


def _track(run: RunDirectory, config: EvaluateConfig, results: list[BenchmarkResult]) -> None:
    trackers = open_trackers(config.tracking, run, asdict(config), 0, print)
    for result in results:
        trackers.log({f"{result.benchmark}/{metric}": value for metric, value in result.metrics.items()}, 0)
    trackers.finish()


def _show(results: list[BenchmarkResult], path: Path) -> None:
    table = Table("benchmark", "method", "metric", "value", "items")
    for result in results:
        overall = {name: value for name, value in result.metrics.items() if "/" not in name}
        rows = [(name, f"{value:.4f}") for name, value in overall.items()] or [
            ("–", "to be graded: answers/")
        ]
        for metric, value in rows:
            table.add_row(result.benchmark, result.method, metric, value, str(len(result.records)))
    Console().print(table)
    print(f"by category: {path}; item by item: {path.parent / 'answers'}", flush=True)
