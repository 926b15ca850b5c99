"""FLOP/s of our whole training step on one core against the matmuls of its linear layers alone, in the same run.

Text rows of 1024 tokens, 8 layers of width 512; forward, backward and AdamW; medians of repeats in turns, one thread.
The step's FLOPs are those of the linear layers and of attention within the causal half. Ends within 3 minutes.
"""

from collections.abc import Callable

import torch

from benchmarks.one_process import build, join_alone, random_row, step
from benchmarks.paired import Interval, in_turns, one_thread, paired_ratio, quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.sizes import LANGUAGE, NUM_TOKENS, TRAINED, vision_model
from megatron_vl.parallel.groups import Groups

ROUNDS = 9
OF_MATMULS = {"fp32": 0.70, "bf16": 0.57}
BF16_FASTER = 1.6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def linear_shapes() -> list[tuple[int, int]]:
    """Inputs and outputs of every linear layer of the decoder, and of the head."""
    hidden, ffn = LANGUAGE.hidden_size, LANGUAGE.ffn_hidden_size
    layer = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    return layer * LANGUAGE.num_layers + [(hidden, LANGUAGE.vocab_size)]


def linear_flops() -> int:
    """Of forward, gradient of the input, and gradient of the weight."""
    return sum(3 * 2 * NUM_TOKENS * inputs * outputs for inputs, outputs in linear_shapes())


def attention_flops() -> int:
    """Scores and weighted values of the causal half, forward and (twice that) backward."""
    scores = NUM_TOKENS * (NUM_TOKENS + 1) // 2
    return 3 * LANGUAGE.num_layers * 2 * 2 * scores * LANGUAGE.hidden_size


def matmuls(dtype: torch.dtype) -> Callable[[], None]:
    """The three products of every linear layer."""
    factors = [
        (
            torch.randn(NUM_TOKENS, inputs, dtype=dtype),
            torch.randn(outputs, inputs, dtype=dtype),
            torch.randn(NUM_TOKENS, outputs, dtype=dtype),
        )
        for inputs, outputs in linear_shapes()
    ]

    def run() -> None:
        for x_SI, weight_OI, gradient_SO in factors:
            _ = x_SI @ weight_OI.t(), gradient_SO @ weight_OI, gradient_SO.t() @ x_SI

    return run


def training(precision: str, groups: Groups) -> Callable[[], object]:
    model = build(vision_model(), groups, precision, TRAINED)
    microbatches = [random_row(LANGUAGE.vocab_size, NUM_TOKENS, seed=0).microbatch()]
    return lambda: step(model, microbatches)


def share_goal(precision: str, step_cpu: list[float], matmul_cpu: list[float]) -> tuple[Goal, Interval]:
    """Of the matmuls' FLOP/s that the step reaches."""
    flops = linear_flops() + attention_flops()
    more = flops / linear_flops()
    share = paired_ratio([more * seconds for seconds in matmul_cpu], step_cpu)
    goal = Goal(
        name=f"of the matmuls' FLOP/s, {precision}",
        ours=flops / quartiles(step_cpu).median / 1e9,
        peer=linear_flops() / quartiles(matmul_cpu).median / 1e9,
        unit="GFLOP/s",
        ratio=share.median,
        bound="at least",
        goal=OF_MATMULS[precision],
    )
    return goal, share


def main() -> None:
    one_thread()
    groups = join_alone()
    sides: dict[str, Callable[[], object]] = {}
    for precision, dtype in DTYPES.items():
        sides[f"step, {precision}"] = training(precision, groups)
        sides[f"matmuls, {precision}"] = matmuls(dtype)
    times = in_turns(sides, ROUNDS)
    rows = [[name, str(quartiles(of_side.cpu))] for name, of_side in times.items()]
    print(table(["CPU seconds: median [quartiles]", ""], rows), end="\n\n")
    goals, intervals = [], []
    for precision in DTYPES:
        goal, share = share_goal(
            precision, times[f"step, {precision}"].cpu, times[f"matmuls, {precision}"].cpu
        )
        goals.append(goal)
        intervals.append([goal.name, str(share)])
    slow, fast = (times[f"step, {precision}"].cpu for precision in DTYPES)
    faster = paired_ratio(slow, fast)
    goals.append(
        Goal(
            name="times as fast, bf16 step",
            ours=quartiles(fast).median,
            peer=quartiles(slow).median,
            unit="s",
            ratio=faster.median,
            bound="at least",
            goal=BF16_FASTER,
        )
    )
    print(table(["ratio [95 %]", ""], [*intervals, [goals[-1].name, str(faster)]]), end="\n\n")
    print_goals("matmul_limit", goals)


if __name__ == "__main__":
    run_benchmark(main)
