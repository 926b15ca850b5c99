"""A run directory has one writer, and its files are whole at every moment."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.train.environment import current_commit, environment_versions
from megatron_vl.train.run_dir import LOCK_VARIABLE, RunDirectory, RunStatus, write_atomically


def test_a_second_writer_is_refused_by_name_and_admitted_after_the_first(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.acquire()
    with pytest.raises(UserError, match=rf"run\.dir=.* in use by process {os.getpid()} on \S+, since 2"):
        second.acquire(wait_seconds=0.2)
    first.release()
    second.acquire(wait_seconds=0.2)


def test_a_writer_waits_for_one_that_is_ending(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.acquire()
    threading.Timer(0.5, first.release).start()
    start = time.monotonic()
    second.acquire(wait_seconds=20)
    assert time.monotonic() - start >= 0.4


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal; from megatron_vl.train.run_dir import RunDirectory\n"
        f"RunDirectory({str(tmp_path)!r}).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    RunDirectory(tmp_path).acquire(wait_seconds=0)


def test_a_holder_that_has_not_signed_yet_is_still_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.acquire()
    first.lock.write_text("")
    with pytest.raises(UserError, match="another process that has just started"):
        RunDirectory(tmp_path).acquire(wait_seconds=0)


def test_a_rank_shares_the_lock_of_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = RunDirectory(tmp_path / "run")
    launcher.acquire()
    signed = launcher.lock.read_text()
    monkeypatch.setenv(LOCK_VARIABLE, str(launcher.lock_descriptor))
    RunDirectory(tmp_path / "run").acquire(wait_seconds=0)
    assert launcher.lock.read_text() == signed


def test_another_runs_lock_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "other")
    launcher.acquire()
    other.acquire()
    monkeypatch.setenv(LOCK_VARIABLE, str(launcher.lock_descriptor))
    with pytest.raises(UserError, match="in use"):
        RunDirectory(tmp_path / "other").acquire(wait_seconds=0)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*file/run cannot be written"):
        RunDirectory(tmp_path / "file" / "run").acquire()


def test_status_comes_back_as_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_status() is None
    for status in (RunStatus("running", "adaptor", 1), RunStatus("complete", "sft", 450)):
        run.write_status(status)
        assert run.read_status() == status
    assert json.loads(run.status.read_text()) == {
        "state": "complete",
        "stage": "sft",
        "step": 450,
        "message": "",
    }
    with pytest.raises(ValueError, match="'done' is none of running, "):
        RunStatus("done", "sft", 450)


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_resolved_configuration_names_what_made_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    config = {"model": {"name": "deepseek_vl_tiny"}, "data": {"eos_token": "<｜end▁of▁sentence｜>"}}
    run.write_config(config, current_commit(), environment_versions())
    written = OmegaConf.load(run.config)
    assert {name: written[name] for name in config} == config
    assert list(written)[:2] == ["commit", "environment"]
    assert written["environment"]["python"] == sys.version.split()[0]
    assert written["environment"]["megatron-core"].startswith("0.16.")
