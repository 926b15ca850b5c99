"""A sample's losses in a pack, with other samples before and after it, are those of the sample alone."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.pipeline import run_forward
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build

TOLERANCE = 1e-5


def alone(row: Microbatch, segment: int) -> Microbatch:
    """One segment of a row as a row of its own, with its images."""
    bounds = row.cu_seqlens.tolist()
    start, stop = bounds[segment], bounds[segment + 1]
    units = row.units[segment : segment + 1]
    first = sum(unit.num_images for unit in row.units[:segment])
    here = slice(first, first + units[0].num_images)
    assert row.tokens_1S is not None and row.images_NCHW is not None and row.labels_1S is not None
    return replace(
        row,
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        max_seqlen=stop - start,
        num_images=units[0].num_images,
        units=units,
        segment_units=(0,),
        tokens_1S=row.tokens_1S[:, start:stop],
        images_NCHW=row.images_NCHW[here],
        labels_1S=row.labels_1S[:, start:stop],
    )


def largest_differences(case: Case) -> list[float]:
    """Per sample of a few packed rows: the largest difference between its losses packed and alone."""
    chunks, _, groups = build(case)
    rows = batch(case, 1, groups)
    differences = []
    with parameters_at_rest(chunks):
        for row in rows:
            bounds = row.cu_seqlens.tolist()
            for segment in range(len(row.units)):
                packed = run_forward(chunks, [row], groups)
                unpacked = run_forward(chunks, [alone(row, segment)], groups)
                for packed_1S, unpacked_1S in zip(packed, unpacked, strict=True):  # on the last stage
                    here = packed_1S[:, bounds[segment] : bounds[segment + 1]]
                    differences.append(float((here - unpacked_1S).abs().max()))
    return differences


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
        (2, ParallelConfig(pipeline_size=2)),
    ],
    ids=["serial", "tp2_sp", "pp2"],
)
def test_losses_do_not_depend_on_the_neighbours(world_size: int, parallel: ParallelConfig) -> None:
    differences = run_ranks(world_size, largest_differences, Case(parallel=parallel, num_rows=4))[-1]
    assert len(differences) == 8
    assert max(differences) <= TOLERANCE


def loss_of_a_changed_neighbour(case: Case) -> tuple[float, float]:
    """How far a change of the first sample's text moves its own losses, and the second sample's."""
    chunks, _, groups = build(case)
    row = batch(case, 1, groups)[1]
    assert row.tokens_1S is not None
    changed = row.tokens_1S.clone()
    changed[0, 60] = (changed[0, 60] + 1) % 2000 + 6
    with parameters_at_rest(chunks):
        (before,) = run_forward(chunks, [row], groups)
        (after,) = run_forward(chunks, [replace(row, tokens_1S=changed)], groups)
    moved = (after - before).abs()[0]
    return float(moved[:70].max()), float(moved[70:144].max())


def test_a_neighbour_is_not_seen() -> None:
    own, other = run_ranks(1, loss_of_a_changed_neighbour, Case())[0]
    assert own > 1e-3
    assert other == 0.0
