"""Trackers record what metrics.jsonl says, go on where a run resumes, and never stop one."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vl.config.train import TrackingConfig
from megatron_vl.train.metrics import HeldoutLoss, StartupSeconds, read_rows
from megatron_vl.train.recorder import Recorder
from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.tracking import Tracker, Trackers, flat
from tests.support.metrics import ROW
from tests.support.wandb_file import history

BOTH = TrackingConfig(wandb="offline", tensorboard=True, progress=False)
LATER = (  # written beside the rows of steps
    HeldoutLoss(stage="joint", step=2, global_step=2, source="pages", loss=1.5, num_samples=4),
    StartupSeconds(stage="joint", step=1, global_step=1, seconds={"imports": 2.5}, slowest={"imports": 3.5}),
)


def record(run: RunDirectory, steps: range, tracking: TrackingConfig = BOTH) -> None:
    """A run that begins, or resumes, before `steps`."""
    with Recorder(run, [("joint", 9)], tracking, {"seed": 1}, enabled=True) as recorder:
        recorder.resume_after(steps.start - 1)
        for step in steps:
            loss = float("nan") if step == 3 else 1 / step
            by_source = {"pages": loss, "text": 2 / step}
            recorder.step(replace(ROW, step=step, global_step=step, loss=loss, loss_by_source=by_source))
            if step == 1:
                recorder.started(LATER[1])
            if step == 2:
                recorder.measured([LATER[0]])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    return run


def expected(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """What trackers should hold, by step, from the JSON files alone."""
    rows = {row["global_step"]: dict(flat(row)) for row in read_rows(run.metrics)}
    rows[1] |= {"startup_seconds/imports": 2.5}
    rows[2] |= {"heldout/pages": 1.5}
    return rows


def test_no_tracker_imports_nothing() -> None:
    code = (
        "import sys; from megatron_vl.config.train import TrackingConfig\n"
        "from megatron_vl.train.run_dir import RunDirectory\n"
        "from megatron_vl.train.tracking import open_trackers\n"
        "trackers = open_trackers(TrackingConfig(), RunDirectory('nowhere'), {}, 1, print)\n"
        "trackers.log({}, 1); trackers.finish()\n"
        "sys.exit('wandb' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_offline_wandb_run_reads_back_as_the_metrics_file(run: RunDirectory) -> None:
    for steps in (
        range(1, 5),
        range(5, 7),
    ):  # resumed: each start is a process, at whose end wandb has written
        start = get_context("spawn").Process(target=record, args=(run, steps))
        start.start()
        start.join()
        assert start.exitcode == 0
    identifier = run.tracking_id.read_text().strip()
    files = sorted((run.path / "wandb").glob(f"offline-run-*-{identifier}/run-{identifier}.wandb"))
    assert files and len(list((run.path / "wandb").glob("offline-run-*"))) == len(files)
    assert dict(row for file in files for row in history(file)) == expected(run)


def test_tensorboard_reads_back_as_the_metrics_file_also_after_a_resume(run: RunDirectory) -> None:
    tensorboard = TrackingConfig(tensorboard=True, progress=False)
    record(run, range(1, 7), tensorboard)
    record(run, range(4, 8), tensorboard)  # steps 4 to 6 had not been saved
    events = EventAccumulator(str(run.tensorboard)).Reload()
    for name in ("loss", "loss_by_source/text", "tokens_per_second", "num_tokens", "mfu", "heldout/pages"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(step, row[name]) for step, row in expected(run).items() if row.get(name) is not None]
        assert [step for step, _ in found] == [step for step, _ in wanted], name
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted]), name
    assert "stage" not in events.Tags()["scalars"]


class Failing:
    """A tracker that does its work until it is to do `fails`."""

    def __init__(self, fails: str) -> None:
        self.fails, self.steps = fails, list[int]()
        self.act("open")

    def act(self, what: str) -> None:
        if what == self.fails:
            raise ConnectionError("no route to host\nand much more")

    def log(self, row: Mapping[str, Any], global_step: int) -> None:
        self.act(f"log {global_step}")
        self.steps.append(global_step)

    def finish(self) -> None:
        self.act("finish")


@pytest.mark.parametrize("fails", ["open", "log 2", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(fails: str) -> None:
    said: list[str] = []
    sound = Failing("never")
    openers: dict[str, Callable[[], Tracker]] = {"broken": lambda: Failing(fails), "sound": lambda: sound}
    trackers = Trackers(openers, said.append)
    for step in (1, 2, 3):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert sound.steps == [1, 2, 3]
    assert said == ["broken failed, and is left out from here on: ConnectionError: no route to host"]


def raising(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("target", "asked", "name"),
    [
        ("wandb.init", {"wandb": "offline"}, "wandb"),
        ("wandb.sdk.wandb_run.Run.log", {"wandb": "offline"}, "wandb"),
        ("torch.utils.tensorboard.SummaryWriter.__init__", {"tensorboard": True}, "TensorBoard"),
        ("torch.utils.tensorboard.SummaryWriter.add_scalar", {"tensorboard": True}, "TensorBoard"),
        ("torch.utils.tensorboard.SummaryWriter.close", {"tensorboard": True}, "TensorBoard"),
    ],
)
def test_the_real_trackers_cannot_stop_a_run(
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    asked: dict[str, Any],
    name: str,
) -> None:
    monkeypatch.setattr(target, raising)
    record(run, range(1, 4), TrackingConfig(progress=True, **asked))
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3]
    assert capsys.readouterr().out.count(f"{name} failed, and is left out from here on: OSError") == 1


def test_where_the_network_is_down_wandb_is_left_out(run: RunDirectory) -> None:
    """In a process of its own: wandb keeps the settings that it has read from the environment for another test."""
    code = (
        "import sys; from megatron_vl.config.train import TrackingConfig\n"
        "from megatron_vl.train import tracking\n"
        "from megatron_vl.train.run_dir import RunDirectory\n"
        "tracking.INIT_SECONDS = 1\n"
        "run = RunDirectory(sys.argv[1])\n"
        "trackers = tracking.open_trackers(TrackingConfig(wandb='online'), run, {}, 1, print)\n"
        "trackers.log({'loss': 0.5}, 1); trackers.finish()"
    )
    nobody_listens = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-c", code, str(run.path)]
    said = subprocess.run(
        command, env={**os.environ, **nobody_listens}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert said.startswith("wandb failed, and is left out from here on") and said.count("\n") == 1
