"""Two thousand steps with checkpoints and evaluation: memory, file descriptors and time per step stay."""

import contextlib
import statistics
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.faults import ranks_of
from tests.support.runs import command, metrics, start

STEPS = 2000
MIB = 1 << 20


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_grows(data_root: Path, tmp_path: Path) -> None:
    """The first quarter is left out: allocators and caches fill."""
    run = tmp_path / "run"
    process = start(
        command(
            data_root,
            run,
            "stages=[joint]",
            f"train.steps={STEPS}",
            "train.global_batch_size=2",
            "stage.joint.sequence_length=64",
            "checkpoint.every=100",
            "heldout.every=250",
            "run.num_processes=2",
            "run.hang_seconds=120",
        )
    )
    descriptors: list[tuple[int, int]] = []  # steps done, open files of all ranks
    while process.poll() is None:
        try:
            open_files = sum(rank.num_fds() for rank in ranks_of(process.pid).values())
        except psutil.Error:  # a rank has just ended
            continue
        descriptors.append((len(metrics(run)), open_files))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    assert process.returncode == 0
    rows = metrics(run)
    assert [row["global_step"] for row in rows] == list(range(1, STEPS + 1))
    quarters = [rows[STEPS // 4 * n : STEPS // 4 * (n + 1)] for n in range(4)]
    memory = [max(row["host_memory_bytes"] for row in quarter) / MIB for quarter in quarters]
    seconds = [statistics.median(row["step_seconds"] for row in quarter) for quarter in quarters]
    files = [max(n for step, n in descriptors if step >= STEPS // 4 * q) for q in (1, 2, 3)]
    assert memory[3] < 1.05 * memory[1], f"MiB by quarter: {memory}"
    assert seconds[3] < 1.5 * seconds[1], f"seconds of a step by quarter: {seconds}"
    assert max(files) - min(files) <= 8, f"open files: {files}"
