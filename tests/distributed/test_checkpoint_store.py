"""What is saved is what training stood at, whatever the ranks do meanwhile; a failing disk stops all of them."""

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.checkpoint import saving, store
from megatron_vl.checkpoint.manifest import damage
from megatron_vl.checkpoint.state import whole_checkpoints
from megatron_vl.checkpoint.store import Saved
from megatron_vl.config.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.saving import rank, store_in, tensor_files, trainee
from tests.support.training import Case

DP2 = Case()


def save_both_ways(case: Case, folder: Path, sharding: str) -> list[Saved]:
    """The same state twice; the second time nothing is written before two more steps are trained."""
    one = trainee(case)
    one.train(1)
    blocking = store_in(folder / "blocking", case, asynchronous=False, optimizer_sharding=sharding)
    one.save(blocking)
    trained, write, told = threading.Event(), saving.write, []

    def write_late(job: Any) -> Any:
        trained.wait()
        return write(job)

    saving.write = write_late
    asynchronous = store_in(folder / "asynchronous", case, told.append, optimizer_sharding=sharding)
    one.save(asynchronous)
    one.train(2, asynchronous)
    assert not told
    assert not whole_checkpoints(asynchronous.folder)
    trained.set()
    asynchronous.close_stage()
    return told


@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_reshardable"])
def test_later_steps_do_not_leak_into_it(sharding: str, tmp_path: Path) -> None:
    (saved,) = run_ranks(2, save_both_ways, DP2, tmp_path, sharding)[0]
    blocking, late = (tmp_path / way / "joint-00000001" for way in ("blocking", "asynchronous"))
    assert tensor_files(late) == tensor_files(blocking)
    assert damage(late) is None
    assert saved.optimizer_sharding == sharding
    assert saved.num_bytes == sum((late / name).stat().st_size for name in [*tensor_files(late), "common.pt"])
    assert saved.host_bytes > 0


def save_and_advance(case: Case, folder: Path, most_steps: int) -> list[int]:
    """After which step the checkpoint of the first one was whole."""
    one, whole = trainee(case), []
    asynchronous = store_in(folder, case, lambda saved: whole.append(one.step))
    one.train(1)
    one.save(asynchronous)
    while not whole and one.step < most_steps:
        one.train(1, asynchronous)
    asynchronous.close_stage()
    return whole


def test_it_becomes_whole_while_training_goes_on(tmp_path: Path) -> None:
    steps = run_ranks(2, save_and_advance, DP2, tmp_path, 40)
    assert steps[0] == steps[1]
    assert steps[0][0] < 40


def go_back(case: Case, folder: Path, sharding: str) -> tuple[list[float], list[float]]:
    one = trainee(case)
    one.train(1)
    blocking = store_in(folder, case, asynchronous=False, optimizer_sharding=sharding)
    one.save(blocking)
    first = one.train(3)
    (path,) = whole_checkpoints(folder)
    one.load(path)
    return first, one.train(3)


@pytest.mark.parametrize(
    "sharding", [pytest.param("fully_reshardable", marks=pytest.mark.slow), "dp_reshardable"]
)
def test_a_running_process_goes_back_bit_for_bit(sharding: str, tmp_path: Path) -> None:
    for first, again in run_ranks(2, go_back, DP2, tmp_path, sharding):
        assert first == again


def fill_the_disk(folder: Path, asynchronous: bool) -> tuple[str, list[str]]:
    """The second checkpoint meets a limit in rank 1 alone."""
    one = trainee(DP2)
    one.train(1)
    filling = store_in(folder, DP2, asynchronous=asynchronous)
    one.save(filling)
    filling.close_stage()
    one.train(1)
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        one.save(filling)
        filling.close_stage()
    except UserError as error:
        torch.distributed.barrier()
        return str(error), sorted(path.name for path in folder.iterdir())
    return "", []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fails_one_rank_stops_all_and_costs_nothing(asynchronous: bool, tmp_path: Path) -> None:
    for error, left in run_ranks(2, fill_the_disk, tmp_path, asynchronous):
        assert "joint-00000002 cannot be written: [Errno 27] File too large; its disk has" in error
        assert left == ["joint-00000001"]
    assert damage(tmp_path / "joint-00000001") is None


def find_no_room(folder: Path) -> str:
    usage = store.shutil.disk_usage(folder)
    store.shutil.disk_usage = lambda path: usage._replace(free=1_000_000)
    one = trainee(DP2)
    one.train(1)
    try:
        one.save(store_in(folder, DP2))
    except UserError as error:
        return str(error)
    return ""


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    first, second = run_ranks(2, find_no_room, tmp_path)
    assert first == second
    assert "joint-00000001 cannot be written: it needs 0.0" in first
    assert "GB; its disk has 0.00 GB free" in first
    assert not list(tmp_path.iterdir())
