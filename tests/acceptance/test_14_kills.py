"""Runs killed at twenty seeded moments, by whichever process, end like the uninterrupted one; so does one whose object
store was away, and one that goes on at other sizes."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fault_matrix import BIT_FOR_BIT, WITHIN, Row, seen
from tests.support.faults import by_step, kill, steps_lost
from tests.support.file_server import FileServer, serving
from tests.support.runs import command, finish, metrics, start, wait_for

STEPS = [
    "stages=[adaptor,joint]",
    "train.steps=6",
    "checkpoint.every=2",
    "data.text_ratio=0.5",
    "heldout.max_samples=0",
]
SETTINGS = {
    "tp2": ["parallel.tensor_size=2"],
    "pp2": ["parallel.pipeline_size=2"],
    "dp2": ["run.num_processes=2"],
}
VICTIMS = ("launcher", "rank 0", "rank 1")
KILLS = {"tp2": 7, "pp2": 7, "dp2": 6}  # twenty


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_again_and_again(setting: str, data_root: Path, tmp_path: Path) -> None:
    """Any moment counts: while ranks meet, in a step, while a checkpoint is written, between two stages."""
    overrides = [*STEPS, *SETTINGS[setting]]
    began = time.monotonic()
    status, output = finish(command(data_root, tmp_path / "whole", *overrides))
    assert status == 0, output
    whole_seconds, expected = time.monotonic() - began, by_step(tmp_path / "whole")

    draw = random.Random(f"kills {setting}")
    slowest, most_lost, num_kills, num_complete = 0.0, 0, 0, 0
    while num_kills < KILLS[setting]:
        run = tmp_path / f"run-{num_complete}"
        process = start(command(data_root, run, *overrides))
        time.sleep(draw.uniform(0.3, 0.9) * whole_seconds)
        if process.poll() is None:
            slowest = max(slowest, kill(process, VICTIMS[num_kills % len(VICTIMS)]))
            most_lost = max(most_lost, steps_lost(run, every=2))
            num_kills += 1
        else:  # it came to its end, and another one begins
            assert process.returncode == 0
            assert by_step(run) == expected
            num_complete += 1
    status, output = finish(command(data_root, run, *overrides))
    assert status == 0, output
    assert by_step(run) == expected
    name = f"SIGKILL of launcher, rank 0 and rank 1 in turn, {setting}"
    seen(Row(fault=name, detected_seconds=slowest, steps_lost=most_lost, result=BIT_FOR_BIT))


@pytest.mark.slow
def test_resumed_at_other_tensor_and_pipeline_sizes(data_root: Path, tmp_path: Path) -> None:
    overrides = [*STEPS, "train.stop_at=null"]
    status, output = finish(command(data_root, tmp_path / "whole", *overrides))
    assert status == 0, output
    arguments = command(data_root, tmp_path / "run", *STEPS)
    for sizes, stop in ((["parallel.tensor_size=2"], 2), (["parallel.pipeline_size=2"], 4), ([], None)):
        stopping = [] if stop is None else [f"train.stop_at={stop}"]
        status, output = finish([*arguments, "stages=[adaptor]", *sizes, *stopping])
        assert status == 0, output
    whole, found = by_step(tmp_path / "whole"), by_step(tmp_path / "run")
    assert sorted(found) == list(range(1, 7))
    for step, (loss, gradient_norm) in found.items():
        assert loss == pytest.approx(whole[step][0], abs=1e-5), f"step {step}"
        assert gradient_norm == pytest.approx(whole[step][1], rel=1e-5), f"step {step}"
    seen(Row(fault="resumed at another TP and PP", detected_seconds=None, steps_lost=0, result=WITHIN))


@contextmanager
def away(server: FileServer, seconds: float) -> Iterator[None]:
    """Every request is refused for so long, from the moment on when three steps are done."""
    server.faults.extend(["503"] * 100_000)
    end = threading.Timer(seconds, server.faults.clear)
    end.start()
    try:
        yield
    finally:
        end.join()


@pytest.mark.slow
def test_an_object_store_that_is_away_for_a_while(data_root: Path, tmp_path: Path) -> None:
    """Readers ask again, less and less often; the run waits and loses nothing."""
    overrides = ["stages=[joint]", "train.steps=10", "data.text_ratio=0.5", "heldout.max_samples=0"]
    status, output = finish(command(data_root, tmp_path / "whole", *overrides))
    assert status == 0, output
    files = {f"/{path.relative_to(data_root)}": path.read_bytes() for path in data_root.rglob("*.*")}
    with serving(files) as server:
        far = [
            f"data.sources.{name}.path={server.url}/{name}"
            for name in ("text", "pages", "figures", "photographs")
        ]
        slow = ["data.prefetch_steps=1", "data.access.backoff_seconds=0.25"]
        arguments = command(data_root, tmp_path / "far", *overrides, *far, *slow)
        process = start(arguments)
        wait_for(lambda: len(metrics(tmp_path / "far")) >= 3 or process.poll() is not None, "three steps")
        with away(server, seconds=4.0):
            pass
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert by_step(tmp_path / "far") == by_step(tmp_path / "whole")
    longest = max(row["data_wait_seconds"] for row in metrics(tmp_path / "far"))
    seen(
        Row(
            fault="object store refuses everything for 4 s",
            detected_seconds=longest,
            steps_lost=0,
            result=BIT_FOR_BIT,
        )
    )
