"""Runs that something happens to, as a user starts them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.runs import CHECKOUT, command, environment, metrics

FAULTY = "tests.support.faulty_pretrain"


def faulty(root: Path, run_dir: Path, fault: dict[str, Any], *overrides: str) -> tuple[int, str, float]:
    """Run to the end with a fault (see `faulty_pretrain`). Returns exit status, the screen, and the seconds from the
    last row that was recorded to the end."""
    arguments = command(root, run_dir, *overrides)
    arguments[2] = FAULTY
    done = subprocess.run(
        arguments,
        cwd=CHECKOUT,
        env={**environment(), "FAULT": json.dumps(fault)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=400,
        check=False,
    )
    rows = run_dir / "metrics.jsonl"
    return done.returncode, done.stdout, time.time() - rows.stat().st_mtime if rows.exists() else 0.0


def faults(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of faults.jsonl."""
    path = run_dir / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(run_dir: Path) -> dict[str, Any]:
    """What the run last said of itself."""
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The running ranks of a local launcher, by number."""
    found = {}
    for child in psutil.Process(launcher).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (KeyError, psutil.Error):  # not told yet, or gone
            continue
    return found


def kill(process: subprocess.Popen[str], victim: str) -> float:
    """SIGKILL the `launcher` or a `rank N`, where it runs. Returns the seconds until the launcher had ended."""
    if victim == "launcher":
        target = process.pid
    else:
        ranks = ranks_of(process.pid)
        target = ranks[int(victim.split()[1])].pid if int(victim.split()[1]) in ranks else process.pid
    began = time.monotonic()
    os.kill(target, signal.SIGKILL)
    process.communicate(timeout=120)
    return time.monotonic() - began


def newest_step(run_dir: Path) -> int:
    """Of the checkpoints that are whole, the last one's global step; 0 without any."""
    states = (run_dir / "checkpoints").glob("[!.]*/state.json")
    return max((json.loads(path.read_text())["global_step"] for path in states), default=0)


def last_step(run_dir: Path) -> int:
    """The last step that was recorded."""
    return max((row["global_step"] for row in metrics(run_dir)), default=0)


def steps_lost(run_dir: Path, every: int) -> int:
    """Steps that were done since the newest checkpoint; at most twice `every`, as a save waits for the one before."""
    lost = last_step(run_dir) - newest_step(run_dir)
    assert 0 <= lost <= 2 * every
    return lost


def by_step(run_dir: Path, leave_out: Sequence[int] = ()) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by global step."""
    rows = metrics(run_dir)
    steps = [row["global_step"] for row in rows]
    assert len(steps) == len(set(steps)), f"{run_dir}: a step stands twice: {steps}"
    return {
        row["global_step"]: (row["loss"], row["grad_norm"])
        for row in rows
        if row["global_step"] not in leave_out
    }
