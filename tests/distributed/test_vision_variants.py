"""Every adaptor of Table 10 and every choice of encoders of Figure 10 trains, and computes the same when parallel."""

import pytest

from megatron_vl.config.model_check import ADAPTOR_TOWERS
from megatron_vl.config.parallel import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.training import Case, merged, train

PIPELINE = ParallelConfig(pipeline_size=2)
TENSOR = ParallelConfig(tensor_size=2, sequence_parallel=True)
BOTH = ("sam", "siglip")
VARIANTS = [
    ("hybrid_mlp_gelu", BOTH, TENSOR),
    ("shared_mlp_gelu", BOTH, PIPELINE),
    ("separate_mlp_gelu", BOTH, TENSOR),
    ("pool_width_mlp_gelu", BOTH, PIPELINE),
    ("pool_height_mlp_gelu", BOTH, TENSOR),
    ("mlp_gelu", ("siglip",), PIPELINE),
    ("mlp_gelu", ("sam",), TENSOR),
]


def test_every_kind_is_among_them() -> None:
    assert {kind for kind, *_ in VARIANTS} == ADAPTOR_TOWERS.keys()


QUICK = (
    "hybrid_mlp_gelu-sam-siglip",
    "shared_mlp_gelu-sam-siglip",
    "mlp_gelu-sam",
)  # the others are slow tests
NAMES = ["-".join((kind, *towers)) for kind, towers, _ in VARIANTS]


@pytest.mark.parametrize(
    ("kind", "towers", "parallel"),
    [
        pytest.param(*variant, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, variant in zip(NAMES, VARIANTS, strict=True)
    ],
)
def test_variant_learns_a_batch_and_agrees_with_one_process(
    kind: str, towers: tuple[str, ...], parallel: ParallelConfig
) -> None:
    case = {"adaptor": kind, "towers": towers, "repeat": True, "num_steps": 2, "num_rows": 2}
    expected = run_ranks(1, train, Case(**case))[0]
    found = merged(run_ranks(2, train, Case(parallel=parallel, **case)))

    assert expected.losses == sorted(expected.losses, reverse=True)
    assert expected.losses[0] - expected.losses[-1] > 0.01
    for part in ("adaptor", *(f"towers.{tower}" for tower in towers)):
        gradients = {name: g for name, g in expected.gradients[0].items() if f"stage_zero.{part}." in name}
        assert gradients, part
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, name
            error = (found.gradients[0][name] - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 2e-8 * expected.norms[0], name
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
