"""The helper that other distributed tests run on."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.runs import start, wait_for


def gather(offset: int) -> tuple[int, torch.Tensor, int]:
    everyone = [torch.zeros(2) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.full((2,), float(dist.get_rank() + offset)))
    return dist.get_rank(), torch.stack(everyone), torch.get_num_threads()


def test_results_come_in_the_order_of_ranks() -> None:
    for rank, result in enumerate(run_ranks(3, gather, 10)):
        assert result[0] == rank
        assert result[1].tolist() == [[10, 10], [11, 11], [12, 12]]
        assert result[2] == 1


def fail_on_rank_one(error: Exception) -> None:
    if dist.get_rank() == 1:
        raise error
    dist.barrier()


class TwoPartError(Exception):
    """Can be pickled but not read back: its arguments are not its constructor's."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(left + right)


def fail_with_two_parts() -> None:
    raise TwoPartError("left", "right")


def test_an_exception_of_one_rank_is_raised_here() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="seven") as caught:
        run_ranks(2, fail_on_rank_one, UserError("seven"))
    assert time.monotonic() - start < 30, "the other rank waits in a barrier for up to 120 s"
    note = caught.value.__notes__[0]
    assert "rank 1 of 2" in note
    assert "in fail_on_rank_one" in note


def test_an_exception_that_cannot_be_pickled_is_told_all_the_same() -> None:
    with pytest.raises(RuntimeError, match="TwoPartError: leftright"):
        run_ranks(1, fail_with_two_parts)


def kill_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_vanishes_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes by rank: \{1: -9\}"):
        run_ranks(2, kill_rank_one)


def wait_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_ranks_that_hang_are_reported_with_their_stacks() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 still ran after 9 s") as caught:
        run_ranks(2, wait_on_rank_zero, timeout_seconds=9)
    first, second = str(caught.value).split("rank 1:")
    assert "in wait_on_rank_zero" in first
    assert "in barrier" in second


def wait_for_long(folder: Path) -> None:
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(300)


CALLER = "from tests.distributed.test_device_ranks import *; run_ranks(2, wait_for_long, Path({folder!r}))"


def test_ranks_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    caller = start([sys.executable, "-c", CALLER.format(folder=str(tmp_path))])
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2, "two ranks")
    ranks = [psutil.Process(int(path.name.removeprefix("pid-"))) for path in tmp_path.glob("pid-*")]
    caller.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for rank in alive:
        rank.kill()
    assert not alive
