"""Losses and tokens by source add up to the step's own, at any parallel setting, and are those of the samples."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.parallel.pipeline import run_microbatches
from megatron_vl.train.by_source import told_apart
from megatron_vl.train.step import StepResult, Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build

SOURCES = ("pages", "silent", "text")  # a step has nothing of the second one
CASES = {
    "dp2": Case(),
    "pp2": Case(parallel=ParallelConfig(pipeline_size=2)),
    "tp2_sp": Case(parallel=ParallelConfig(tensor_size=2, sequence_parallel=True)),
}


def with_sources(microbatches: list[Microbatch]) -> list[Microbatch]:
    """The first sample of every row is of one source, the second of another."""
    return [
        replace(
            one, units=tuple(unit._replace(source=("text", "pages")[n]) for n, unit in enumerate(one.units))
        )
        for one in microbatches
    ]


def step_of(case: Case) -> StepResult:
    chunks, optimizer, groups = build(case)
    rows = with_sources(batch(case, 2, groups))
    return train_step(chunks, optimizer, rows, groups, 1.0, Vote(sources=SOURCES))


def masked_losses(case: Case) -> dict[str, float]:
    """The loss of each source alone, by masking the other one."""
    chunks, _, groups = build(case)
    losses = {}
    for source, segment in (("text", 0), ("pages", 1)):
        rows = []
        for one in batch(case, 2, groups):
            assert one.loss_mask_1S is not None
            kept = torch.zeros_like(one.loss_mask_1S)
            start, end = one.cu_seqlens[segment : segment + 2].tolist()
            kept[:, start:end] = one.loss_mask_1S[:, start:end]
            rows.append(replace(one, loss_mask_1S=kept))
        result = run_microbatches(chunks, rows, groups, forward_only=True)
        losses[source] = float(result.loss_sum / result.num_tokens)
    return losses


@pytest.mark.parametrize("name", CASES)
def test_losses_of_sources_are_those_of_their_samples(name: str) -> None:
    (expected,) = run_ranks(1, masked_losses, Case())
    for result in run_ranks(2, step_of, CASES[name]):
        assert result.loss_by_source == pytest.approx(expected, rel=1e-5)
        assert result.num_tokens_by_source == {"text": 8 * 70, "pages": 8 * 74}
        assert sum(result.num_tokens_by_source.values()) == result.num_tokens
        assert result.num_pairs == 8 * (70**2 + 74**2) / 2


def test_a_source_whose_loss_is_not_finite_leaves_the_others_theirs() -> None:
    values = [float("nan"), 0.0, 6.0, 2, 0, 3, 100, 0, 50]
    losses, tokens = told_apart(SOURCES, values)
    assert losses["text"] == 2.0
    assert losses["pages"] != losses["pages"]
    assert "silent" not in losses and tokens == {"pages": 100, "text": 50}


def nan_in_one_segment(case: Case) -> list[list[float]]:
    chunks, _, groups = build(case)
    (row, *_) = batch(case, 2, groups)
    assert row.loss_mask_1S is not None
    row.loss_mask_1S[0, 3] = float("nan")  # in the first sample
    return [sums.tolist() for sums in run_microbatches(chunks, [row], groups).segment_sums]


def test_a_loss_that_is_not_finite_stays_in_its_segment() -> None:
    (((first, second, padding),),) = run_ranks(1, nan_in_one_segment, Case())
    assert first[0] != first[0]
    assert 0 < second[0] < 1e4 and second[1] > 0
    assert padding == [0.0, 0.0]
