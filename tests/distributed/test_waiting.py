"""How long ranks wait for each other: one time for the start, another one for what follows."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.test_device_process_group import clean_environment

Started = subprocess.Popen[str]

RANK = """
import os, sys, time
from megatron_vl.config.errors import UserError
from megatron_vl.device.machine import Device
from megatron_vl.device.process_group import initialize_distributed, set_timeout
from megatron_vl.device.processes import rank_environment
import torch, torch.distributed as dist
start_seconds, step_seconds, late_seconds, hang_seconds = map(float, sys.argv[1:5])
environment = rank_environment()
if environment.rank == 1:
    time.sleep(late_seconds)
try:
    initialize_distributed(environment, Device("cpu"), start_seconds)
except UserError as error:
    print(error, flush=True)
    os._exit(3)
set_timeout(step_seconds)
if environment.rank == 1:
    time.sleep(hang_seconds)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(error, flush=True)
    os._exit(4)
print("done", flush=True)
"""


@contextmanager
def ranks(tmp_path: Path, numbers: list[int], world_size: int, *seconds: float) -> Iterator[list[Started]]:
    """Those of the world with these numbers, given `seconds` as RANK takes them; killed in the end."""
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started = []
    for number in numbers:
        variables = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
        environment = clean_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **variables)
        command = [sys.executable, str(program), *map(str, seconds)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def end_of(process: Started) -> tuple[int, str]:
    """Exit status and last words."""
    words, _ = process.communicate(timeout=300)
    return process.returncode, words


def test_a_rank_may_come_later_than_a_step_may_take(tmp_path: Path) -> None:
    with ranks(tmp_path, [0, 1], 2, 200, 5, 8, 0) as started:
        assert [end_of(process) for process in started] == [(0, "done\n")] * 2


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with ranks(tmp_path, [0, 2], 3, 10, 1, 0, 0) as started:
        (status, words), (other_status, _) = map(end_of, started)
    assert status == other_status == 3
    assert "rank 1 of 3 did not come to 127.0.0.1" in words
    assert "run.start_timeout_seconds=10" in words


def test_a_rank_that_hangs_is_waited_for_as_long_as_a_step_may_take(tmp_path: Path) -> None:
    with ranks(tmp_path, [0, 1], 2, 200, 1, 0, 300) as started:
        status, words = end_of(started[0])
    assert status == 4
    assert "1000ms" in words


def test_without_rank_zero_the_others_say_so(tmp_path: Path) -> None:
    with ranks(tmp_path, [1], 2, 1, 1, 0, 0) as started:
        status, words = end_of(started[0])
    assert status == 3
    assert "rank 1 did not meet rank 0 at 127.0.0.1" in words
