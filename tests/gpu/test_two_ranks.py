"""Smoke test of two ranks: tensor, pipeline and data parallelism train as each other. On CPU everywhere, on two GPUs
where there are any.
"""

from pathlib import Path

import pytest

from tests.support.gpus import needs_gpus
from tests.support.runs import build_data, command, finish, losses

SETTINGS = {
    "TP2": ["parallel.tensor_size=2", "parallel.sequence_parallel=true"],
    "PP2": ["parallel.pipeline_size=2"],
    "DP2": ["run.num_processes=2"],
}


@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [("cpu", "fp32", 1e-5), pytest.param("cuda", "bf16", 2e-2, marks=needs_gpus(2))],
)
def test_two_ranks(device: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    build_data(tmp_path / "data", num_samples=24)
    hidden = ["env", "CUDA_VISIBLE_DEVICES="] if device == "cpu" else []
    short = ["stages=[joint]", "data.warmup_fraction=0", "train.steps=2", "heldout.max_samples=0"]
    found = {}
    for name, setting in SETTINGS.items():
        run = tmp_path / name
        overrides = [*short, *setting, f"train.precision={precision}"]
        status, output = finish([*hidden, *command(tmp_path / "data", run, *overrides)])
        assert status == 0, output
        found[name] = losses(run)
        assert len(found[name]) == 2
    for name in ("PP2", "DP2"):
        for one, other in zip(found["TP2"], found[name], strict=True):
            assert other == pytest.approx(one, rel=tolerance), name
