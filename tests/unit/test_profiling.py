"""A profile covers its window of steps, on its ranks, and nothing else."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import ProfileConfig, TrackingConfig
from megatron_vl.device.machine import Device
from megatron_vl.train.profiling import ProfilerWindow
from megatron_vl.train.settings import check_choices


def run(folder: Path, config: ProfileConfig, rank: int, steps: range) -> list[str]:
    """Each step names itself in the trace. Returns what was said."""
    said: list[str] = []
    with ProfilerWindow(config, folder, rank, Device("cpu"), said.append) as profiler:
        for step in steps:
            profiler.before(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).sum()
            profiler.after(step)
    return said


def steps_in(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [
        (range(1, 9), 3, ["step 3", "step 4"]),
        (range(1, 4), 3, ["step 3"]),  # the run ends within the window
        (range(4, 9), 4, ["step 4"]),  # a resumed run comes into it
    ],
)
def test_the_trace_holds_the_steps_of_the_window(
    tmp_path: Path, steps: range, first: int, expected: list[str]
) -> None:
    run(tmp_path, ProfileConfig(steps=[3, 4], ranks=[5]), 5, steps)
    (trace,) = tmp_path.iterdir()
    assert trace.name == f"rank-5-from-step-{first}.json.gz"
    assert steps_in(trace) == expected


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig(steps=[3, 4], ranks=[1])])
def test_other_ranks_and_other_steps_leave_nothing(tmp_path: Path, config: ProfileConfig) -> None:
    assert run(tmp_path / "profile", config, 0, range(1, 9)) == []
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    (words,) = run(tmp_path / "profile", ProfileConfig(steps=[1, 1]), 0, range(1, 3))
    assert words.startswith("tracking.profile: ") and "rank-0-from-step-1" in words


@pytest.mark.parametrize(
    ("profile", "field"),
    [
        (ProfileConfig(steps=[3]), "steps"),
        (ProfileConfig(steps=[4, 3]), "steps"),
        (ProfileConfig(steps=[0, 3]), "steps"),
        (ProfileConfig(steps=[1, 3], ranks=[-1]), "ranks"),
    ],
)
def test_a_window_that_is_none_is_refused(profile: ProfileConfig, field: str) -> None:
    with pytest.raises(UserError, match=rf"tracking\.profile\.{field}="):
        check_choices(PretrainConfig(tracking=TrackingConfig(profile=profile)))
