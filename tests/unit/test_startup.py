"""A start's phases leave no gap, and ranks other than the first write nothing as they start."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vl.train import startup
from megatron_vl.train.startup import PHASES, Startup
from tests.support.runs import CHECKOUT


class Clock:
    """In place of time.monotonic."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=clock))
    return clock


def test_phases_leave_no_gap(clock: Clock) -> None:
    start = Startup(_last=clock.now)
    for now, phase in ((103.0, "groups"), (104.0, "model"), (109.0, "optimizer"), (110.5, "model")):
        clock.now = now
        start.ended(phase)
    assert start.seconds == {"groups": 3.0, "model": 2.5, "optimizer": 5.0}
    assert sum(start.seconds.values()) == clock.now - 100.0


def test_a_later_stage_starts_anew_and_a_first_one_keeps_what_came_before(clock: Clock) -> None:
    start = Startup(_last=clock.now)
    clock.now = 101.0
    start.ended("imports")
    start.begin_stage()
    clock.now = 102.0
    start.ended("first step")
    assert start.seconds == {"imports": 1.0, "first step": 1.0}
    clock.now = 500.0  # trained in between
    start.begin_stage()
    clock.now = 507.0
    start.ended("groups")
    assert start.seconds == {"groups": 7.0}


def test_a_process_counts_from_its_own_start() -> None:
    start = Startup.of_process()
    start.ended("imports")
    assert start.seconds["imports"] > 0.0
    with pytest.raises(ValueError, match="no phase"):
        start.ended("lunch")
    assert PHASES[-1] == "first step"


def test_only_the_first_rank_writes_as_it_starts(tmp_path: Path) -> None:
    variables = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    command = [sys.executable, "-m", "launch.pretrain", "run.dir=here", "run.start_timeout_seconds=1"]
    command += [f"data.root={tmp_path / 'nowhere'}"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **variables, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert list(tmp_path.iterdir()) == []
