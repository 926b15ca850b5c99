"""Which benchmarks there are, and how each is read, answered and scored by default (paper, section 4).

The paper has multimodal benchmarks, GSM8K, AGIEval and MBPP answered by greedy generation, HellaSwag and MMLU by
the perplexity of the options, and text by its bits per byte.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import exams, grading, language, metrics, visual
from megatron_vl.evaluate.benchmarks.execution import grade_by_execution
from megatron_vl.evaluate.items import Item

Method = Literal["choice", "generate", "bits_per_byte"]
Reader = Callable[[Path, Path | None], list[Item]]
Grader = Callable[[Item, str], float]
Aggregate = Callable[[Sequence[Item], Sequence[float]], dict[str, float]]

LETTER_TOKENS = 32  # a letter, or an option's text
PHRASE_TOKENS = 128
SOLUTION_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. `read` takes its file or folder, and the folder of its images where it has one.

    `method` is the default. The items with options also serve "choice", which compares these; `grade` scores
    a generated answer from 0 to 1 and is None where the grading happens elsewhere. `aggregate` makes the metrics
    of the scores, and `metric` is the name of the main one.
    """

    read: Reader
    method: Method = "generate"
    max_new_tokens: int = LETTER_TOKENS
    grade: Grader | None = grading.grade_choice
    aggregate: Aggregate = metrics.accuracy
    metric: str = "accuracy"


BENCHMARKS: dict[str, Benchmark] = {
    "mmbench": Benchmark(
        read=visual.read_mmbench, aggregate=metrics.circular_accuracy, metric="circular_accuracy"
    ),
    "mmbench_cn": Benchmark(
        read=visual.read_mmbench_cn, aggregate=metrics.circular_accuracy, metric="circular_accuracy"
    ),
    "seed_bench": Benchmark(read=visual.read_seed_bench),
    "scienceqa": Benchmark(read=visual.read_scienceqa),
    "pope": Benchmark(
        read=visual.read_pope, grade=grading.grade_yes_no, aggregate=metrics.yes_no, metric="f1"
    ),
    "ocrbench": Benchmark(
        read=visual.read_ocrbench,
        max_new_tokens=PHRASE_TOKENS,
        grade=grading.grade_contained,
        aggregate=metrics.total_score,
        metric="score",
    ),
    "mm_vet": Benchmark(read=visual.read_mm_vet, max_new_tokens=SOLUTION_TOKENS, grade=None, metric="score"),
    "mmmu": Benchmark(read=exams.read_mmmu, max_new_tokens=PHRASE_TOKENS, grade=grading.grade_open),
    "cmmmu": Benchmark(read=exams.read_cmmmu, max_new_tokens=PHRASE_TOKENS, grade=grading.grade_cmmmu),
    "mathvista": Benchmark(
        read=exams.read_mathvista, max_new_tokens=SOLUTION_TOKENS, grade=grading.grade_mathvista
    ),
    "hellaswag": Benchmark(read=language.read_hellaswag, method="choice", max_new_tokens=PHRASE_TOKENS),
    "mmlu": Benchmark(read=language.read_mmlu, method="choice"),
    "agieval": Benchmark(
        read=language.read_agieval, max_new_tokens=PHRASE_TOKENS, grade=grading.grade_agieval
    ),
    "gsm8k": Benchmark(read=language.read_gsm8k, max_new_tokens=SOLUTION_TOKENS, grade=grading.grade_gsm8k),
    "mbpp": Benchmark(read=language.read_mbpp, max_new_tokens=SOLUTION_TOKENS, grade=None),
    "text": Benchmark(read=language.read_texts, method="bits_per_byte", grade=None, metric="bits_per_byte"),
}


def find_benchmark(name: str, *, execute_code: bool = False) -> Benchmark:
    """The benchmark of that name. Only with `execute_code` are MBPP's programs run, hence graded.

    Raises UserError where there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; valid: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if name == "mbpp" and execute_code:
        return replace(benchmark, grade=grade_by_execution)
    return benchmark
