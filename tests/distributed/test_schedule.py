"""The order of passes that planning counts on is the one that megatron-core's schedules run."""

import pytest
import torch

from megatron_vl.measure.recording import record_schedule
from megatron_vl.parallel.groups import build_groups, destroy_groups
from megatron_vl.planning.schedule import Pass, Schedule
from megatron_vl.planning.topology import Topology
from tests.support.ranks import run_ranks

# Per pipeline size: (virtual size, microbatches, group size or 0 for the smallest).
CASES = {
    1: [(1, 3, 0)],
    2: [(1, 1, 0), (1, 2, 0), (1, 5, 0), (2, 2, 0), (2, 6, 0), (2, 5, 3), (2, 9, 0), (2, 9, 9), (3, 4, 0)],
    4: [(1, 2, 0), (1, 4, 0), (1, 9, 0), (2, 4, 0), (2, 8, 0), (2, 6, 6), (2, 9, 0), (3, 8, 0)],
}


def schedules(pipeline_size: int) -> list[Schedule]:
    return [
        Schedule(pipeline_size=pipeline_size, virtual_size=virtual, num_microbatches=count, group_size=group)
        for virtual, count, group in CASES[pipeline_size]
    ]


def record(pipeline_size: int) -> list[list[Pass]]:
    """What this rank does in each of the schedules."""
    recorded = []
    for schedule in schedules(pipeline_size):
        topology = Topology(
            world_size=pipeline_size, pipeline_size=pipeline_size, virtual_size=schedule.virtual_size
        )
        groups = build_groups(topology, seed=1, device=torch.device("cpu"))
        spans = record_schedule(schedule, groups)
        recorded.append([Pass(span.kind, span.chunk, span.microbatch) for span in spans])
        destroy_groups()
    return recorded


@pytest.mark.parametrize("pipeline_size", CASES)
def test_passes_run_in_the_order_of_the_schedule(pipeline_size: int) -> None:
    by_rank = run_ranks(pipeline_size, record, pipeline_size)
    for rank, recorded in enumerate(by_rank):
        for schedule, passes in zip(schedules(pipeline_size), recorded, strict=True):
            assert passes == schedule.passes(rank), f"{schedule}, rank {rank}"
