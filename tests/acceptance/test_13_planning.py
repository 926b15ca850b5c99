"""launch.plan as users call it, and training by the layouts that it finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import command, finish, losses

PLAN = ("model=deepseek_vl_7b", "cluster=a100_64x8", "stages=[joint]")
KEYS = {
    "tensor_size",
    "pipeline_size",
    "virtual_size",
    "data_size",
    "micro_batch_size",
    "layout",
    "recompute",
    "vision_placement",
    "step_seconds",
    "bubble_fraction",
    "mfu",
    "mfu_with_vision",
    "peak_memory_bytes",
    "days",
}
STEPS = {"adaptor": 2, "joint": 2, "sft": 2}
SIZES = [  # whose layouts differ by what trains
    "stage.adaptor.train=[adaptor]",
    "stage.adaptor.expected.images=20",
    "parallel.pipeline_size=2",
    "train.steps=2",
    "heldout.max_samples=0",
    "cluster=this_cpu",
]


def planned(*overrides: str) -> tuple[int, str]:
    python, flag, *_ = command(Path(), Path())
    return finish([python, flag, "launch.plan", *overrides])


def test_the_last_line_is_one_object() -> None:
    status, output = planned(*PLAN, "search.tensor_size=2", "search.pipeline_size=2", "output=json")
    assert status == 0, output
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert found.keys() >= KEYS
    assert found["tensor_size"] * found["pipeline_size"] * found["data_size"] == 512
    assert 2304 % (found["data_size"] * found["micro_batch_size"]) == 0
    assert found["layout"].count("t") == 30
    assert len(found["layout"].split("|")) == 2 * found["virtual_size"]
    assert found["peak_memory_bytes"] < 80 * 2**30
    assert found["days"] == pytest.approx(found["step_seconds"] * 42_000 / 86_400)
    assert 0.4 < found["mfu"] < found["mfu_with_vision"] < 0.7


def test_what_cannot_be_is_said_in_one_line_with_what_can() -> None:
    kept = ("search.tensor_size=2", "search.pipeline_size=2")
    status, output = planned(*PLAN, "cluster.num_nodes=512", *kept)
    assert status == 1
    (line,) = output.strip().splitlines()
    assert line.startswith("error: ")
    assert "global_batch_size=2304" in line
    assert "1024" in line
    assert "2 x 8" in line  # TP2 x PP8 leaves 256 replicas


@pytest.mark.slow
def test_layouts_follow_what_trains(data_root: Path, tmp_path: Path) -> None:
    """Stages that differ in freezing are divided anew, with the weights of the stage before; against their layouts
    given by hand."""
    run = tmp_path / "auto"
    status, output = finish(command(data_root, run, *SIZES, "parallel.layout=auto"))
    assert status == 0, output
    told = [line for line in output.splitlines() if "parallel.layout=auto" in line]
    layouts = {line.split()[1].rstrip(":"): line.split()[-1] for line in told}
    assert layouts.keys() == STEPS.keys()
    assert layouts["adaptor"] != layouts["joint"] != layouts["sft"]
    by_hand = [f'+stage.{stage}.parallel.layout="{layout}"' for stage, layout in layouts.items()]
    status, output = finish(command(data_root, tmp_path / "by_hand", *SIZES, *by_hand))
    assert status == 0, output
    assert losses(run) == losses(tmp_path / "by_hand")
    assert len(losses(run)) == 6
