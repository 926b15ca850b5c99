"""A run on a bad week: signals, hangs, broken numbers, broken memory. docs/reliability.md has the table."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_matrix import BIT_FOR_BIT, NO_RESULT, WITHIN, Row, seen
from tests.support.faults import by_step, faults, faulty, last_step, newest_step, status, steps_lost
from tests.support.runs import command, finish

DP2 = ["stages=[joint]", "data.text_ratio=0.5", "heldout.max_samples=0", "run.num_processes=2"]
TP2 = [*DP2[:3], "parallel.tensor_size=2"]
PP2 = [*DP2[:3], "parallel.pipeline_size=2"]


def trained(root: Path, run_dir: Path, *overrides: str) -> None:
    exit_status, output = finish(command(root, run_dir, *overrides))
    assert exit_status == 0, output


# NaN in the loss of three steps.
BREAKS: dict[str, Any] = {"kind": "loss", "rank": 1, "steps": [6, 7, 8], "factor": None}
GOES_BACK = ["train.steps=12", "checkpoint.every=4", "train.faults.skipped_in_a_row=3"]


def only_skipped(root: Path, run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step of the run that skips the three steps and does not go back."""
    exit_status, output, _ = faulty(root, run, BREAKS, *DP2, *GOES_BACK[:2])
    assert exit_status == 0, output
    assert [row["step"] for row in faults(run)] == BREAKS["steps"]
    return by_step(run, leave_out=BREAKS["steps"])


def test_data_that_break_the_loss_are_given_up(data_root: Path, tmp_path: Path) -> None:
    """The run goes back in its process, passes three steps over, and is elsewhere the run that only skipped them."""
    expected = only_skipped(data_root, tmp_path / "skips")
    exit_status, output, _ = faulty(data_root, tmp_path / "back", BREAKS, *DP2, *GOES_BACK)
    assert exit_status == 0, output
    kinds = [row["kind"] for row in faults(tmp_path / "back")]
    assert kinds == 3 * ["skipped"] + ["rolled_back"] + 3 * ["passed_over"]
    assert by_step(tmp_path / "back") == expected
    seen(Row(fault="NaN in the loss of three steps", detected_seconds=None, steps_lost=3, result=BIT_FOR_BIT))


@pytest.mark.slow
def test_a_resume_at_another_size_knows_what_was_given_up(data_root: Path, tmp_path: Path) -> None:
    run, expected = tmp_path / "back", only_skipped(data_root, tmp_path / "skips")
    exit_status, output, _ = faulty(data_root, run, BREAKS, *DP2, *GOES_BACK, "train.stop_at=10")
    assert exit_status == 0, output
    found = by_step(run)
    assert sorted(found) == [1, 2, 3, 4, 5, 9, 10]
    assert found == {step: expected[step] for step in found}
    trained(data_root, run, *DP2[:3], *GOES_BACK)
    found = by_step(run)
    assert sorted(found) == sorted(expected)
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, abs=1e-5), f"step {step}"
    seen(Row(fault="resumed at another DP", detected_seconds=None, steps_lost=0, result=WITHIN))


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_ends(data_root: Path, tmp_path: Path) -> None:
    """SIGSTOP of rank 0, which serves the ranks' store."""
    check_stop(data_root, tmp_path, rank=0, overrides=DP2, name="SIGSTOP of rank 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "rank", "name"),
    [
        (DP2, 1, "SIGSTOP of another data-parallel rank"),
        (TP2, 1, "SIGSTOP of a tensor-parallel rank"),
        (PP2, 0, "SIGSTOP of the first pipeline stage"),
        (PP2, 1, "SIGSTOP of the last pipeline stage"),
    ],
)
def test_whichever_rank_is_stopped(
    data_root: Path, tmp_path: Path, overrides: list[str], rank: int, name: str
) -> None:
    check_stop(data_root, tmp_path, rank, overrides, name)


def check_stop(root: Path, tmp_path: Path, rank: int, overrides: list[str], name: str) -> None:
    run, settings = tmp_path / "run", [*overrides, "train.steps=6", "checkpoint.every=2"]
    fault = {"kind": "stopped", "rank": rank, "steps": [4]}
    exit_status, output, seconds = faulty(root, run, fault, *settings, "run.hang_seconds=15")
    assert exit_status != 0
    assert f"from rank {rank} (process" in output and "nothing was heard for" in output
    other = (run / "logs" / f"rank-{1 - rank}.log").read_text()
    assert "Thread 0x" in other and "_train_and_record" in other  # the stack of the one that waited
    assert status(run)["state"] == "running"  # what started it starts it again
    assert [row["kind"] for row in faults(run)] == ["hang"]
    lost = steps_lost(run, every=2)

    trained(root, run, *settings)
    trained(root, tmp_path / "whole", *settings)
    assert by_step(run) == by_step(tmp_path / "whole")
    seen(Row(fault=name, detected_seconds=seconds, steps_lost=lost, result=BIT_FOR_BIT))


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(data_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = {"kind": "stuck", "rank": 1, "steps": [4]}
    settings = [*PP2, "train.steps=6", "checkpoint.every=2", "run.hang_seconds=15"]
    exit_status, output, seconds = faulty(data_root, run, fault, *settings)
    assert exit_status != 0
    assert "no rank has moved for" in output and "the least advanced first: rank 1 (process" in output
    assert "time.sleep(1000)" not in output and "faulty_pretrain.py" in (run / "logs/rank-1.log").read_text()
    seen(
        Row(
            fault="a rank that lives but stands still",
            detected_seconds=seconds,
            steps_lost=steps_lost(run, every=2),
            result=NO_RESULT,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "rank", "name"),
    [
        (DP2, 1, "SIGUSR1 to one data-parallel rank, then SIGTERM"),
        (TP2, 1, "SIGUSR1 to one tensor-parallel rank, then SIGTERM"),
        (PP2, 0, "SIGUSR1 to the first pipeline stage, then SIGTERM"),
        (PP2, 1, "SIGUSR1 to the last pipeline stage, then SIGTERM"),
    ],
)
def test_a_signal_to_one_rank_is_one_checkpoint_of_all(
    data_root: Path, tmp_path: Path, overrides: list[str], rank: int, name: str
) -> None:
    """And the second signal, in the midst of saving, changes nothing."""
    run, settings = tmp_path / "run", [*overrides, "train.steps=6"]
    fault = {"kind": "signalled", "rank": rank, "steps": [3]}
    _, output, seconds = faulty(data_root, run, fault, *settings)
    assert status(run) | {"message": ""} == {
        "state": "interrupted",
        "stage": "joint",
        "step": 3,
        "message": "",
    }
    assert newest_step(run) == last_step(run) == 3, output
    assert "Traceback" not in (run / "logs" / "rank-1.log").read_text()
    trained(data_root, run, *settings)
    trained(data_root, tmp_path / "whole", *settings)
    assert by_step(run) == by_step(tmp_path / "whole")
    seen(Row(fault=name, detected_seconds=seconds, steps_lost=0, result=BIT_FOR_BIT))


@pytest.mark.slow
def test_a_spike_is_skipped(data_root: Path, tmp_path: Path) -> None:
    run, fault = tmp_path / "run", {"kind": "loss", "rank": 0, "steps": [11], "factor": 10.0}
    settings = ["train.steps=12", "train.faults.spike_window=4", "train.faults.spike_deviations=5"]
    exit_status, output, _ = faulty(data_root, run, fault, *DP2, *settings)
    assert exit_status == 0, output
    (row,) = faults(run)
    assert (row["kind"], row["step"]) == ("skipped", 11) and row["loss"] > row["max_loss"]


@pytest.mark.slow
def test_the_run_gives_up_when_going_back_does_not_help(data_root: Path, tmp_path: Path) -> None:
    run, fault = tmp_path / "run", {"kind": "loss", "rank": 0, "steps": list(range(4, 40)), "factor": None}
    settings = ["train.steps=12", "checkpoint.every=2", "train.faults.skipped_in_a_row=2"]
    exit_status, output, seconds = faulty(
        data_root, run, fault, *DP2, *settings, "train.faults.max_rollbacks=2"
    )
    assert exit_status == 1
    assert "error: stage joint, steps " in output and "after going back 2 times to the checkpoint" in output
    rolled_back = [row for row in faults(run) if row["kind"] == "rolled_back"]
    assert [row["to_global_step"] for row in rolled_back] == [2, 2]
    assert newest_step(run) == 2
    seen(
        Row(
            fault="NaN in every loss from some step on",
            detected_seconds=seconds,
            steps_lost=last_step(run) - newest_step(run),
            result=NO_RESULT,
        )
    )


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_one_clear_error(data_root: Path, tmp_path: Path) -> None:
    run, fault = tmp_path / "run", {"kind": "out_of_memory", "rank": 1, "steps": [3]}
    exit_status, output, seconds = faulty(data_root, run, fault, *PP2, "train.steps=6", "checkpoint.every=2")
    assert exit_status == 1
    assert "error: rank 1 (pipeline stage 1 of 2, " in output
    assert "ran out of memory at stage joint, step 3, forward 2: " in output
    assert "the memory model expects 0." in output
    lost = steps_lost(run, every=2)
    seen(Row(fault="out of memory", detected_seconds=seconds, steps_lost=lost, result=NO_RESULT))


@pytest.mark.slow
def test_corrupted_parameters_end_the_run_and_are_not_saved(data_root: Path, tmp_path: Path) -> None:
    run, fault = tmp_path / "run", {"kind": "corrupted", "rank": 1, "steps": [4]}
    settings = [*DP2, "train.steps=6", "checkpoint.every=2", "parallel.overlap_param_gather=false"]
    exit_status, output, seconds = faulty(data_root, run, fault, *settings)
    assert exit_status == 1
    assert "silent corruption, found in stage joint, step 4: the parameters of rank 0 on " in output
    assert newest_step(run) == 2
    lost = steps_lost(run, every=2)
    trained(data_root, run, *settings)
    trained(data_root, tmp_path / "whole", *settings)
    assert by_step(run) == by_step(tmp_path / "whole")
    seen(
        Row(
            fault="one bit of a parameter flips on one rank",
            detected_seconds=seconds,
            steps_lost=lost,
            result=BIT_FOR_BIT,
        )
    )
