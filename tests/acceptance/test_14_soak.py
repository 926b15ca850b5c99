"""Two thousand steps with checkpoints and evaluation: memory, file descriptors and time per step stay."""

import contextlib
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.runs import command, metrics, start

STEPS = 2000
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """After `step` steps: bytes in memory and open files of all processes of the run."""

    step: int
    memory: int
    open_files: int

    @classmethod
    def of(cls, launcher: int, run: Path) -> "Sample":
        """Raises psutil.Error if a process ends meanwhile."""
        processes = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
        return cls(
            step=len(metrics(run)),
            memory=sum(one.memory_info().rss for one in processes),
            open_files=sum(one.num_fds() for one in processes),
        )


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
    samples: list[Sample] = []
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # a process that has just ended
            samples.append(Sample.of(process.pid, run))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    assert process.returncode == 0
    rows = metrics(run)
    assert [row["global_step"] for row in rows] == list(range(1, STEPS + 1))
    quarters = [rows[STEPS // 4 * n : STEPS // 4 * (n + 1)] for n in range(4)]
    seconds = [statistics.median(row["step_seconds"] for row in quarter) for quarter in quarters]
    later = [[one for one in samples if n <= 4 * one.step / STEPS < n + 1] for n in (1, 2, 3)]
    memory = [max(one.memory / MIB for one in ones) for ones in later]
    files = [max(one.open_files for one in ones) for ones in later]
    assert max(memory) < 1.05 * memory[0], f"MiB by quarter: {memory}"
    assert max(seconds[2:]) < 1.5 * seconds[1], f"seconds of a step by quarter: {seconds}"
    assert max(files) - min(files) <= 8, f"open files: {files}"
