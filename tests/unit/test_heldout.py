"""Losses with the right and with other images, sample by sample."""

import pytest
import torch

from megatron_vl.evaluate.heldout import SampleScores, paired_difference


def scores(sums: list[float], counts: list[float]) -> SampleScores:
    return SampleScores(
        loss_sums=torch.tensor(sums, dtype=torch.float64),
        num_tokens=torch.tensor(counts, dtype=torch.float64),
    )


def test_a_sample_counts_where_it_has_a_loss_with_both() -> None:
    """The second has none with its own image, the fourth none with the other one."""
    right = scores([2.0, 0.0, 3.0, 9.0], [2.0, 0.0, 1.0, 1.0])
    wrong = scores([6.0, 5.0, 4.0, 0.0], [2.0, 1.0, 1.0, 0.0])
    found = paired_difference(right, wrong)
    assert found is not None
    assert (found.right, found.wrong, found.difference, found.num_samples) == (2.0, 3.5, 1.5, 2)
    margin = 1.96 * 0.5**0.5 / 2**0.5  # of the differences 2 and 1
    assert (found.low, found.high) == pytest.approx((1.5 - margin, 1.5 + margin))


def test_without_such_a_sample_nothing_is_said() -> None:
    assert paired_difference(scores([1.0, 0.0], [1.0, 0.0]), scores([0.0, 1.0], [0.0, 1.0])) is None
    assert paired_difference(scores([], []), scores([], [])) is None
