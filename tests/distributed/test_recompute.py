"""Recomputing activations changes no gradient, under any freezing; bf16 trains as fp32 does."""

import pytest

from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from tests.support.ranks import run_ranks
from tests.support.training import Case, merged, train

ALL = ("siglip", "sam", "sam_downsample", "adaptor", "embedding", "decoder", "head")


SELECTIVE, FULL = RecomputeConfig(language="selective"), RecomputeConfig(language="full", vision=True)
CASES = [
    pytest.param(FULL, ALL, id="full-all"),
    pytest.param(FULL, ("adaptor",), id="full-adaptor"),
    pytest.param(FULL, ("decoder",), id="full-decoder"),
    pytest.param(SELECTIVE, ALL, id="selective-all"),
    pytest.param(SELECTIVE, ("adaptor",), id="selective-adaptor", marks=pytest.mark.slow),
    pytest.param(SELECTIVE, ("decoder",), id="selective-decoder", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recompute", "train_parts"), CASES)
def test_gradients_are_the_same(recompute: RecomputeConfig, train_parts: tuple[str, ...]) -> None:
    case = Case(train=train_parts, num_steps=2)
    plain = run_ranks(1, train, case)[0]
    pipelined = Case(
        train=train_parts, num_steps=2, recompute=recompute, parallel=ParallelConfig(pipeline_size=2)
    )
    recomputed = merged(run_ranks(2, train, pipelined))
    assert recomputed.losses == pytest.approx(plain.losses, abs=1e-5)
    for step, gradients in enumerate(plain.gradients):
        for name, gradient in gradients.items():
            error = (recomputed.gradients[step][name] - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 2e-8 * plain.norms[step], f"step {step + 1}: {name}"


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(), marks=pytest.mark.slow),
        ParallelConfig(tensor_size=2, sequence_parallel=True),
    ],
)
def test_bf16_follows_fp32(parallel: ParallelConfig) -> None:
    """With fp32 main weights and fp32 gradient sums, losses stay within bf16's rounding of fp32's."""
    expected = run_ranks(1, train, Case())[0]
    found = run_ranks(parallel.tensor_size, train, Case(precision="bf16", parallel=parallel))[0]
    assert found.losses == pytest.approx(expected.losses, abs=0.03)
    assert found.losses != pytest.approx(expected.losses, abs=1e-6)
