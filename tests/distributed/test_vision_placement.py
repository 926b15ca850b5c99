"""Wherever images are encoded, losses and all gradients are those of stage zero encoding them on each of its ranks."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.parallel.groups import destroy_groups
from tests.support.ranks import run_ranks
from tests.support.training import Case, Outcome, merged, train

SETTINGS = {
    "tp2": (2, ParallelConfig(tensor_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
    "pp2_vpp2": (2, ParallelConfig(pipeline_size=2, virtual_size=2)),
    "tp2_pp2": (4, ParallelConfig(tensor_size=2, pipeline_size=2)),
    "pp4_uneven": (4, ParallelConfig(pipeline_size=4, layout="Et||tt|tL")),
    "tp2_sp_dp2": (4, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2_dp2_exposed": (
        4,
        ParallelConfig(pipeline_size=2, overlap_grad_reduce=False, overlap_param_gather=False),
    ),
    "tp2_sp_pp2_dp2": (8, ParallelConfig(tensor_size=2, pipeline_size=2, sequence_parallel=True)),
}
# The paper's freezing (Table 4), everything at once as in the tiny model's last stage, and nothing of vision.
FREEZING = {
    "adaptor": ("adaptor",),
    "joint": ("adaptor", "embedding", "decoder", "head"),
    "sft": ("siglip", "adaptor", "embedding", "decoder", "head"),
    "everything": ("siglip", "sam", "sam_downsample", "adaptor", "embedding", "decoder", "head"),
    "decoder": ("decoder",),
}
# All axes and all freezing of encoders; the rest of the matrix takes minutes.
QUICK = {("tp2_pp2", "everything"), ("tp2_sp_dp2", "sft"), ("pp2_vpp2", "adaptor")}
TOLERANCE = 1e-5  # of a loss, and of the norm of a tensor's gradient
ROUNDING = 2e-8  # of the whole gradient's norm: a scalar like the HD alpha can sum to nearly nothing


def train_all(cases: list[Case]) -> list[Outcome]:
    """One after the other on this rank."""
    outcomes = []
    for case in cases:
        outcomes.append(train(case))
        destroy_groups()
    return outcomes


@pytest.mark.parametrize(
    ("setting", "freezing"),
    [
        pytest.param(
            setting,
            freezing,
            marks=() if (setting, freezing) in QUICK else pytest.mark.slow,
            id=f"{setting}-{freezing}",
        )
        for setting in SETTINGS
        for freezing in FREEZING
    ],
)
def test_placements_agree(setting: str, freezing: str) -> None:
    """Rows of 0 to 3 images; the second step has none, the third one's encoders are what the first one made of them."""
    world_size, parallel = SETTINGS[setting]
    placements = ["replicated", "spread", *(["split"] if parallel.tensor_size > 1 else [])]
    cases = [
        Case(
            parallel=replace(parallel, vision_placement=placement),
            train=FREEZING[freezing],
            num_steps=3,
            num_rows=4,
            most_images=3,
        )
        for placement in placements
    ]
    by_rank = run_ranks(world_size, train_all, cases)
    expected, *others = (list(outcomes) for outcomes in zip(*by_rank, strict=True))
    for placement, found in zip(placements[1:], others, strict=True):
        _check_equal(found, merged(expected), placement)


def _check_equal(outcomes: list[Outcome], expected: Outcome, placement: str) -> None:
    found = merged(outcomes)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE), placement
    assert found.norms == pytest.approx(expected.norms, rel=TOLERANCE), placement
    for step, gradients in enumerate(expected.gradients):
        assert found.gradients[step].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (found.gradients[step][name] - gradient).norm()
            allowed = TOLERANCE * gradient.norm() + ROUNDING * expected.norms[step]
            assert error <= allowed, f"{placement}, step {step + 1}: {name}"
    assert found.weights.keys() == expected.weights.keys()
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        assert outcome.replicas_differ == []
        for name, before in outcome.frozen_before.items():
            assert torch.equal(before, outcome.frozen_after[name]), name
