"""The local launcher: what ranks are told, what reaches the screen, and that none of them stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import start_local_ranks
from megatron_vl.config.errors import UserError
from megatron_vl.train.run_dir import RunDirectory, RunStatus

Launch = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    return run


@pytest.fixture
def launch(tmp_path: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Runs Python lines as ranks; `rank`, `say` and `arguments` are defined for them."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    prelude = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\narguments = sys.argv[1:]\n"

    def start(code: str, num_processes: int = 2, **options: object) -> int:
        (tmp_path / "stub_rank.py").write_text(prelude + textwrap.dedent(code))
        return start_local_ranks(num_processes, ["a=1"], run, module="stub_rank", **options)  # type: ignore[arg-type]

    return start


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_ranks_know_their_place_and_only_rank_zero_speaks(
    launch: Launch, run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    status = launch(
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
        print(*(os.environ[name] for name in names), arguments)
        assert int(os.environ["MEGATRON_VL_LAUNCHER"]) == os.getppid()
        print("noise", rank, file=sys.stderr)
        """,
        threads_per_process=3,
    )
    screen = capfd.readouterr()
    assert status == 0
    assert screen.out == "0 0 2 2 3 ['a=1']\n"
    assert screen.err == ""
    assert (run.logs / "rank-1.log").read_text() == "1 1 2 2 3 ['a=1']\nnoise 1\n"
    assert (run.logs / "rank-0.log").read_text() == "noise 0\n"


def test_ranks_meet_in_a_process_group(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    status = launch(
        """
        if rank == 0:
            time.sleep(1)  # the others come first, and wait for the store
        import torch
        from megatron_vl.device.machine import Device
        from megatron_vl.device.process_group import destroy_distributed, initialize_distributed
        from megatron_vl.device.processes import rank_environment
        initialize_distributed(rank_environment(), Device("cpu"), timeout_seconds=60)
        total = torch.tensor(rank + 1)
        torch.distributed.all_reduce(total)
        print(total.item())
        destroy_distributed()
        """
    )
    assert (status, capfd.readouterr().out) == (0, "3\n")


def test_the_launcher_needs_no_torch() -> None:
    """It takes seconds to import, and its threads and memory are the ranks' to have."""
    script = "import launch.pretrain, launch.ranks, megatron_vl.train.sources, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_user_error_of_every_rank_is_printed_once_and_last(
    launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = launch(
        """
        print("loading", flush=True)
        print("error: data.path=nowhere does not exist", file=sys.stderr)
        print("[W123] a library says goodbye", file=sys.stderr)
        sys.exit(1)
        """
    )
    screen = capfd.readouterr()
    assert status == 1
    assert screen.err == "error: data.path=nowhere does not exist\n"
    assert screen.out == "loading\n"


def test_the_cause_is_told_from_its_consequences(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 breaks first but is slow to end; rank 0's complaint about its lost peer is not shown."""
    status = launch(
        """
        import atexit
        if rank == 1:
            atexit.register(time.sleep, 1)
            raise ValueError("the cause")
        time.sleep(0.5)
        raise ConnectionError("the consequence")
        """
    )
    error = capfd.readouterr().err
    assert status == 1
    assert error.startswith("\nrank 1 failed with exit status 1; all it said is in ")
    assert error.endswith("ValueError: the cause\n")
    assert "consequence" not in error


def test_a_user_error_outweighs_an_earlier_crash(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    launch(
        """
        if rank == 0:
            raise ConnectionError("peer closed the connection")
        time.sleep(0.3)
        print("error: shard-000003.tar differs from its index", file=sys.stderr)
        sys.exit(1)
        """
    )
    assert capfd.readouterr().err == "error: shard-000003.tar differs from its index\n"


def test_a_killed_rank_takes_the_others_with_it(
    launch: Launch, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.ranks.GRACE_SECONDS", 0.3)
    start = time.monotonic()
    status = launch(
        """
        if rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        """
    )
    assert status == 1
    assert time.monotonic() - start < 30
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_messages_of_an_earlier_start_are_not_repeated(
    launch: Launch, run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    launch("print('error: old', file=sys.stderr); sys.exit(1)", num_processes=1)
    launch("sys.exit(3)", num_processes=1)
    assert capfd.readouterr().err.count("old") == 1
    assert (run.logs / "rank-0.log").read_text() == "error: old\n"


INTERRUPTIBLE = """
    def stop(number, frame):
        print("rank", rank, signal.Signals(number).name, file=sys.stderr)
        sys.exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getppid(), int(os.environ["STUB_SIGNAL"]))
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_every_rank_once(
    launch: Launch, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("STUB_SIGNAL", str(int(number)))
    before = signal.getsignal(number)
    run.write_status(RunStatus("interrupted", "joint", 3))
    assert launch(INTERRUPTIBLE) == 128 + number
    assert signal.getsignal(number) == before
    for rank in range(2):
        assert (run.logs / f"rank-{rank}.log").read_text() == f"rank {rank} {number.name}\n"


def test_a_signal_after_the_last_step_leaves_success(
    launch: Launch, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_SIGNAL", str(int(signal.SIGTERM)))
    run.write_status(RunStatus("complete", "sft", 9))
    assert launch(INTERRUPTIBLE) == 0


def test_a_second_interrupt_ends_ranks_at_once(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    status = launch(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if rank == 0:
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
        """
    )
    assert status == 128 + signal.SIGINT
    assert capfd.readouterr().err == ""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], list[int]]]]:
    """Starts two ranks from a process of its own; returns it and the ranks' pids, which they print first."""
    pids: list[int] = []

    def start(code: str) -> tuple[subprocess.Popen[str], list[int]]:
        (tmp_path / "stub_rank.py").write_text("import os, signal, sys, time\n" + textwrap.dedent(code))
        main = (
            "import sys; from launch.ranks import start_local_ranks\n"
            "from megatron_vl.train.run_dir import RunDirectory, RunStatus\n"
            f"run = RunDirectory({str(tmp_path / 'run')!r}); run.acquire()\n"
            "run.write_status(RunStatus('interrupted', 'joint', 3))\n"
            "sys.exit(start_local_ranks(2, [], run, module='stub_rank'))"
        )
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
        command = [sys.executable, "-c", main]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        pids.append(int(process.stdout.readline()))
        log = tmp_path / "run/logs/rank-1.log"
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
        pids.append(int(log.read_text()))
        return process, pids

    yield start
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_the_lock_outlives_a_killed_launcher_until_its_ranks_end(launcher: Any, tmp_path: Path) -> None:
    """A stub that ignores its launcher's death holds the run directory; the next start waits for it."""
    process, pids = launcher("print(os.getpid(), flush=True); time.sleep(60)")
    process.kill()
    process.wait()

    second = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
        second.acquire(wait_seconds=0.3)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids))
    second.acquire(wait_seconds=5)


def test_control_c_in_a_terminal_reaches_ranks_once(launcher: Any, tmp_path: Path) -> None:
    """The terminal signals its whole foreground process group."""
    process, pids = launcher(
        """
        count = []
        signal.signal(signal.SIGINT, lambda number, frame: count.append(number))
        print(os.getpid(), flush=True)
        while not count:
            time.sleep(0.05)
        time.sleep(0.5)
        print("interrupts:", len(count), file=sys.stderr)
        """
    )
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 128 + signal.SIGINT
    logs = tmp_path / "run/logs"
    assert (logs / "rank-0.log").read_text() == "interrupts: 1\n"
    assert (logs / "rank-1.log").read_text() == f"{pids[1]}\ninterrupts: 1\n"
