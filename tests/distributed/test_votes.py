"""What single ranks tell at the end of a step, all of them learn."""

from dataclasses import astuple

from megatron_vl.data.shard_reader import Traffic
from megatron_vl.device.machine import MemoryUse
from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build

GIB = 2**30


def held(host: int, peak: int | None = None, reserved: int | None = None) -> MemoryUse:
    return MemoryUse(host_bytes=host, device_peak_bytes=peak, device_reserved_bytes=reserved)


ON_HOSTS = (held(3 * GIB), held(4 * GIB + 1))
ON_GPUS = (held(2 * GIB, 70 * GIB, 71 * GIB), held(9 * GIB, 60 * GIB, 70 * GIB))
VOTES = {
    "who saves": [(Vote(), Vote(saving=True)), (Vote(), Vote())],
    "who stops": [(Vote(stop_requested=True), Vote()), (Vote(), Vote())],
    "traffic": [
        (
            Vote(traffic=Traffic(bytes_fetched=5, bytes_used=3)),
            Vote(traffic=Traffic(bytes_fetched=2**40, bytes_used=2**39)),
        )
    ],
    "memory": [tuple(Vote(memory=memory) for memory in by_rank) for by_rank in (ON_HOSTS, ON_GPUS)],
}


def told(case: Case) -> dict[str, list[object]]:
    """What this rank knows after each step."""
    chunks, optimizer, groups = build(case)
    rank = groups.collection.dp.rank()
    results = {
        name: [
            train_step(chunks, optimizer, batch(case, 1, groups), groups, 1.0, votes[rank]) for votes in steps
        ]
        for name, steps in VOTES.items()
    }
    return {
        "who saves": [one.saving for one in results["who saves"]],
        "who stops": [one.stop_requested for one in results["who stops"]],
        "traffic": [(one.bytes_fetched, one.bytes_used) for one in results["traffic"]],
        "memory": [(one.fullest.rank, astuple(one.fullest.memory)) for one in results["memory"]],
    }


def test_every_rank_learns_what_one_tells() -> None:
    for known in run_ranks(2, told, Case()):
        assert known == {
            "who saves": [True, False],
            "who stops": [True, False],
            "traffic": [(2**40 + 5, 2**39 + 3)],
            "memory": [(1, astuple(ON_HOSTS[1])), (0, astuple(ON_GPUS[0]))],
        }
