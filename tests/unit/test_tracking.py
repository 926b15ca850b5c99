"""Weights & Biases is asked for, or not even imported; a resume goes on in the same run."""

import subprocess
import sys
from pathlib import Path

from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.tracking import open_tracker


def test_disabled_tracking_imports_nothing() -> None:
    code = (
        "import sys; from megatron_vl.train.tracking import open_tracker\n"
        "from megatron_vl.train.run_dir import RunDirectory\n"
        "tracker = open_tracker('disabled', 'p', RunDirectory('nowhere'), {})\n"
        "tracker.log({}, 1); tracker.finish(); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_offline_run_is_kept_in_the_run_directory_and_resumed_by_its_id(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    ids = []
    for step in (1, 2):
        tracker = open_tracker("offline", "megatron-vl", run, {"run": {"seed": 1}})
        tracker.log({"loss": float("nan"), "step": step}, global_step=step)
        tracker.finish()
        ids.append(run.tracking_id.read_text().strip())
    assert ids[0] == ids[1] != ""
    recordings = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))
    assert recordings and all(path.stat().st_size > 0 for path in recordings)
