"""A run outlives damaged checkpoints and full disks: it goes on from the newest good one, and loses none."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_vl.checkpoint.manifest import damage
from megatron_vl.checkpoint.state import whole_checkpoints
from tests.support.fault_matrix import BIT_FOR_BIT, Row, seen
from tests.support.faults import last_step
from tests.support.runs import command, environment, finish, losses

STEPS = [
    "stages=[adaptor]",
    "train.steps=8",
    "heldout.max_samples=0",
    "checkpoint.every=2",
    "run.num_processes=2",
]


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without a fault. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    overrides = [*STEPS, "checkpoint.keep=2", "checkpoint.keep_every=4"]
    status, output = finish(command(data_root, folder, *overrides))
    assert status == 0, output
    return folder


def test_what_stays_and_what_it_cost(whole: Path) -> None:
    names = ["adaptor-00000004", "adaptor-00000006", "adaptor-00000008"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == names
    rows = [json.loads(line) for line in (whole / "checkpoints.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [2, 4, 6, 8]
    assert all(row["asynchronous"] and row["optimizer_sharding"] == "fully_reshardable" for row in rows)
    assert all(row["num_bytes"] > 1e6 and row["host_bytes"] > 1e6 for row in rows)
    assert all(row["stall_seconds"] > 0 for row in rows)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def copy_of(whole: Path, folder: Path) -> Path:
    """The folder of the checkpoints of a copy of the run."""
    shutil.copytree(whole, folder)
    return folder / "checkpoints"


def test_a_truncated_one_is_named_and_passed_over(data_root: Path, whole: Path, tmp_path: Path) -> None:
    """The newest: the run goes on from the one before, to the same losses; every step stands once in the metrics."""
    checkpoints = copy_of(whole, tmp_path / "run")
    os.truncate(checkpoints / "adaptor-00000008" / "__1_0.distcp", 1000)
    status, output = finish(command(data_root, tmp_path / "run", *STEPS))
    assert status == 0, output
    assert "checkpoint adaptor-00000008 is damaged, and passed over: __1_0.distcp has 1000 bytes" in output
    assert "resuming after step 6" in output
    assert losses(tmp_path / "run") == losses(whole)
    assert (checkpoints / "adaptor-00000008.damaged").is_dir()
    row = Row(
        fault="the newest checkpoint is truncated", detected_seconds=None, steps_lost=2, result=BIT_FOR_BIT
    )
    seen(row)


@pytest.mark.slow
def test_one_with_another_content_is_named_and_passed_over(
    data_root: Path, whole: Path, tmp_path: Path
) -> None:
    """All files have their sizes. Of a complete run the launcher would not ask for more, so its last one goes."""
    checkpoints = copy_of(whole, tmp_path / "run")
    shutil.rmtree(checkpoints / "adaptor-00000008")
    with (checkpoints / "adaptor-00000006" / "__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        (byte,) = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    status, output = finish(command(data_root, tmp_path / "run", *STEPS))
    assert status == 0, output
    assert "checkpoint adaptor-00000006 is damaged, and passed over: the content of __0_0.distcp" in output
    assert "resuming after step 4" in output
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_nothing(data_root: Path, whole: Path, tmp_path: Path) -> None:
    """A file system of its own, with room for one checkpoint and a half. With more room the run goes on."""
    (one, *_) = whole_checkpoints(whole / "checkpoints")
    room = sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) * 3 // 2
    checkpoints, left = tmp_path / "run" / "checkpoints", tmp_path / "left"
    checkpoints.mkdir(parents=True)
    run = shlex.join(command(data_root, tmp_path / "run", *STEPS))
    mount = f"mount -t tmpfs -o size={room} tmpfs {checkpoints}"
    keep = f"status=$?; cp -r {checkpoints} {left}; exit $status"
    process = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mount} || exit 99; {run}; {keep}"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks die with their launcher
        raise
    if process.returncode == 99:
        pytest.skip(f"no file system can be mounted here: {output.strip()}")
    assert process.returncode == 1, output
    message = r"adaptor-00000004 cannot be written: it needs 0\.\d\d GB; its disk has 0\.\d\d GB free"
    assert re.search(message, output), output
    assert [path.name for path in left.iterdir()] == ["adaptor-00000002"]
    assert damage(left / "adaptor-00000002") is None
    lost = last_step(tmp_path / "run") - 2

    shutil.copytree(left, checkpoints, dirs_exist_ok=True)
    status, output = finish(command(data_root, tmp_path / "run", *STEPS))
    assert status == 0, output
    assert losses(tmp_path / "run") == losses(whole)
    seen(
        Row(
            fault="the disk is full during a save", detected_seconds=None, steps_lost=lost, result=BIT_FOR_BIT
        )
    )
