"""A text-only step runs no encoder at any parallel setting, and none of them hangs on it."""

from typing import Any

import pytest

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.train.step import Vote, train_step
from tests.acceptance.test_2_parallel_parity import FREEZING, SETTINGS
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build


def encoder_calls(case: Case) -> list[int]:
    """How often each step's forward passes called a vision encoder on this rank; odd steps are multimodal."""
    chunks, optimizer, groups = build(case)
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls[-1] += 1

    for module in chunks[0].module.modules():
        if type(module).__name__ in ("SiglipEncoder", "SamEncoder"):
            module.register_forward_pre_hook(count)
    for step in (2, 4, 1, 2, 3):
        calls.append(0)
        train_step(chunks, optimizer, batch(case, step, groups), groups, 1.0, Vote())
    return calls


QUICK = ("pp2", "tp2_sp_pp2_dp2")  # the others are slow tests


@pytest.mark.parametrize(
    ("setting", "freezing"),
    [
        *(
            pytest.param(setting, "everything", marks=() if setting in QUICK else pytest.mark.slow)
            for setting in SETTINGS
        ),
        ("pp2", "adaptor"),
        ("tp2_sp_pp2_dp2", "adaptor"),
    ],
)
def test_no_encoder_runs(setting: str, freezing: str) -> None:
    world_size, parallel = SETTINGS[setting]
    case = Case(parallel=parallel, train=FREEZING[freezing])
    for rank, calls in enumerate(run_ranks(world_size, encoder_calls, case)):
        assert (calls[0], calls[1], calls[3]) == (0, 0, 0), f"rank {rank}"
        on_first_stage = rank < world_size // parallel.pipeline_size  # pipeline stages are the outer ranks
        assert (calls[2] > 0) == (calls[4] > 0) == on_first_stage, f"rank {rank}"


def mixed_step(case: Case) -> float:
    """One data-parallel rank's last microbatch has images, the other's has none."""
    chunks, optimizer, groups = build(case)
    rows = batch(case, 1, groups)
    with_images = [row for row in rows if row.num_images]
    without = [row for row in rows if not row.num_images]
    ordered = with_images + without if groups.data_rank else without + with_images
    return train_step(chunks, optimizer, ordered, groups, 1.0, Vote()).gradient_norm


def test_ranks_may_differ_in_which_microbatch_has_images() -> None:
    """The order of a rank's microbatches changes nothing, and overlapped reductions do not wait forever."""
    overlapped = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    norms = run_ranks(2, mixed_step, Case(parallel=overlapped))
    plain = run_ranks(
        2, mixed_step, Case(parallel=ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False))
    )
    assert norms[0] == norms[1]
    assert norms == pytest.approx(plain, rel=1e-6)
