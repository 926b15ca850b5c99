"""Every parallel setting computes what one process computes: losses, gradients of every tensor, frozen weights."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_vl.config.parallel import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.training import Case, Outcome, merged, train

SETTINGS = {
    "tp2": (2, ParallelConfig(tensor_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
    "pp2_vpp2": (2, ParallelConfig(pipeline_size=2, virtual_size=2)),
    "pp4_uneven": (4, ParallelConfig(pipeline_size=4, layout="Et||tt|tL")),
    "dp2_overlapped": (2, ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)),
    "pp2_vpp2_dp2": (4, ParallelConfig(pipeline_size=2, virtual_size=2)),
    "tp2_pp2": (4, ParallelConfig(tensor_size=2, pipeline_size=2)),
    "tp2_sp_pp2_dp2": (8, ParallelConfig(tensor_size=2, pipeline_size=2, sequence_parallel=True)),
}
# The paper's freezing (Table 4), and everything at once as in the tiny model's last stage.
FREEZING = {
    "adaptor": ("adaptor",),
    "joint": ("adaptor", "embedding", "decoder", "head"),
    "sft": ("siglip", "adaptor", "embedding", "decoder", "head"),
    "everything": ("siglip", "sam", "sam_downsample", "adaptor", "embedding", "decoder", "head"),
}
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the tensor's norm
ROUNDING = 2e-8  # of the whole gradient's norm: a scalar like the HD alpha can sum to nearly nothing


@cache
def serial(freezing: str) -> Outcome:
    return run_ranks(1, train, Case(train=FREEZING[freezing]))[0]


# All settings with everything trained, and each freezing at the setting with every size; the rest of the matrix takes
# minutes.
COVERING = ("tp2_sp_pp2_dp2",)
SLOW = ("pp2_vpp2_dp2",)
MATRIX = [
    pytest.param(
        setting,
        freezing,
        marks=()
        if (freezing == "everything" and setting not in SLOW) or setting in COVERING
        else pytest.mark.slow,
        id=f"{setting}-{freezing}",
    )
    for setting in SETTINGS
    for freezing in FREEZING
]


@pytest.mark.parametrize(("setting", "freezing"), MATRIX)
def test_agrees_with_one_process(setting: str, freezing: str) -> None:
    world_size, parallel = SETTINGS[setting]
    expected = serial(freezing)
    outcomes = run_ranks(world_size, train, Case(parallel=parallel, train=FREEZING[freezing]))
    check_agreement(outcomes, expected)


def test_microbatches_that_the_pipeline_size_does_not_divide() -> None:
    """Interleaved in larger groups."""
    case = Case(parallel=SETTINGS["pp2_vpp2"][1], num_rows=5, num_steps=2)
    expected = run_ranks(1, train, replace(case, parallel=ParallelConfig()))[0]
    check_agreement(run_ranks(2, train, case), expected)


@pytest.mark.slow
def test_gathers_that_the_interleaved_schedule_begins_change_nothing() -> None:
    """Bit for bit, where no vision parameter trains."""
    overlapped = Case(
        parallel=replace(SETTINGS["pp2_vpp2_dp2"][1], overlap_grad_reduce=True, overlap_param_gather=True),
        train=("embedding", "decoder", "head"),
    )
    at_once = replace(overlapped, parallel=replace(overlapped.parallel, overlap_param_gather=False))
    found, expected = (run_ranks(4, train, case) for case in (overlapped, at_once))
    for one, other in zip(found, expected, strict=True):
        assert one.losses == other.losses
        assert one.norms == other.norms


def check_agreement(outcomes: list[Outcome], expected: Outcome) -> None:
    """All that ranks saw together, against one process."""
    found = merged(outcomes)
    assert found.losses == pytest.approx(expected.losses, abs=LOSS_TOLERANCE)
    assert found.norms == pytest.approx(expected.norms, rel=GRADIENT_TOLERANCE)
    for step, gradients in enumerate(expected.gradients):
        assert found.gradients[step].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (found.gradients[step][name] - gradient).norm()
            allowed = GRADIENT_TOLERANCE * gradient.norm() + ROUNDING * expected.norms[step]
            assert error <= allowed, f"step {step + 1}: {name}"
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        assert outcome.replicas_differ == []
        assert outcome.frozen_before.keys() == outcome.frozen_after.keys()
        for name, before in outcome.frozen_before.items():
            assert torch.equal(before, outcome.frozen_after[name]), name


@pytest.mark.parametrize("freezing", FREEZING)
def test_the_reference_is_no_idle_run(freezing: str) -> None:
    """Losses move, every trained tensor has a gradient on multimodal steps, and the HD branch is visible."""
    outcome = serial(freezing)
    assert len(set(outcome.losses)) == len(outcome.losses)
    for name, gradient in outcome.gradients[0].items():
        assert gradient.norm() > 0, name
    if freezing == "everything":
        assert any("neck_hd" in name for name in outcome.gradients[0])
