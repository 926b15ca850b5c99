"""The rule by which a SLURM job comes back, and the status that it reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.requeue import decide, read_restarts, requeue
from megatron_vl.config.errors import PassingError, UserError
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import RunConfig
from megatron_vl.train.run_dir import RunDirectory, RunStatus


@pytest.mark.parametrize(
    ("state", "answers"),
    [
        # never yet in vain, in vain as often as allowed
        ("complete", ("done", "done")),
        ("stopped", ("done", "done")),
        ("refused", ("stop", "stop")),
        ("interrupted", ("requeue", "stop")),
        ("failed", ("requeue", "stop")),
        ("running", ("requeue", "stop")),
        (None, ("requeue", "stop")),
    ],
)
def test_the_status_decides(state: str | None, answers: tuple[str, str]) -> None:
    status = RunStatus(state, "joint", 7, "what it said") if state else None
    assert (decide(status, 0, 3)[0], decide(status, 3, 3)[0]) == answers


def test_the_message_is_told() -> None:
    assert "what it said" in decide(RunStatus("refused", "joint", 7, "what it said"), 0, 3)[1]


def config_of(folder: Path) -> PretrainConfig:
    return PretrainConfig(run=RunConfig(dir=str(folder), max_restarts=2))


def test_restarts_without_a_newer_checkpoint_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By job: whoever submits again has looked."""
    newest: list[Path] = []
    monkeypatch.setattr("launch.requeue.newest_checkpoint", lambda folder: newest[-1] if newest else None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for expected in ("requeue", "requeue", "stop"):
        requeue(config_of(tmp_path))
        assert read_restarts(RunDirectory(tmp_path))[-1].answer == expected
    newest.append(tmp_path / "adaptor-00000004")
    for expected in ("requeue", "requeue", "stop"):
        requeue(config_of(tmp_path))
        assert read_restarts(RunDirectory(tmp_path))[-1].answer == expected
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    requeue(config_of(tmp_path))
    assert read_restarts(RunDirectory(tmp_path))[-1].answer == "requeue"


def status_after(folder: Path, errors: list[tuple[int, Exception]], state: str = "running") -> dict[str, Any]:
    """Of a run whose ranks end with these errors, in this order."""
    run = RunDirectory(folder)
    run.write_status(RunStatus(state, "joint", 3))
    for rank, error in errors:
        with pytest.raises(type(error)), run.failures_told(rank):
            raise error
    values: dict[str, Any] = json.loads(run.status.read_text())
    return values


def test_the_first_failure_is_kept(tmp_path: Path) -> None:
    status = status_after(tmp_path, [(3, ValueError("first")), (0, RuntimeError("connection closed"))])
    assert (status["state"], status["message"]) == ("failed", "rank 3: ValueError: first")


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_of_the_user_goes_first(order: int, tmp_path: Path) -> None:
    errors = [(3, UserError("give another value")), (0, RuntimeError("connection closed"))][::order]
    status = status_after(tmp_path, errors)
    assert (status["state"], status["message"]) == ("refused", "give another value")


def test_what_passes_by_itself_is_tried_again(tmp_path: Path) -> None:
    assert status_after(tmp_path, [(0, PassingError("ranks 8-15 did not come"))])["state"] == "failed"


@pytest.mark.parametrize("state", ["complete", "interrupted", "stopped"])
def test_what_ended_well_stays_so(state: str, tmp_path: Path) -> None:
    assert status_after(tmp_path, [(1, UserError("too late"))], state)["state"] == state
