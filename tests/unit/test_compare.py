"""Runs side by side: what differs is shown, what does not is not, and numbers are those of the files."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.compare import main, table
from launch.comparison import differences, name_runs, read_runs
from megatron_vl.config.errors import UserError
from megatron_vl.train.run_dir import RunDirectory, RunStatus


def write_run(folder: Path, config: dict[str, Any], losses: list[float], **fields: float) -> Path:
    """A run of `losses`, a step of one second and 100 tokens each."""
    run = RunDirectory(folder)
    run.logs.mkdir(parents=True)
    run.write_config(config, commit=folder.name, environment={"torch": folder.name})
    run.write_status(RunStatus("complete", "joint", len(losses)))
    rows = [
        {
            "stage": "joint",
            "global_step": step,
            "modality": "text",
            "loss": loss,
            "num_tokens": 100,
            "num_images": 0,
            "num_failed_samples": 0,
            "skipped": False,
            "step_seconds": 1.0 if step > 1 else 1000.0,
            "tokens_per_second": 100.0 if step > 1 else 0.1,
            **fields,
        }
        for step, loss in enumerate(losses, start=1)
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout = [{"source": "pages", "global_step": step, "loss": loss} for step, loss in enumerate(losses)]
    run.heldout.write_text("".join(json.dumps(row) + "\n" for row in heldout))
    return folder


def test_differences() -> None:
    left = {"a": {"b": 1, "c": 1e-4}, "same": [1], "also_b": 1, "commit": "x", "run": {"dir": "l", "seed": 3}}
    right = {
        "a": {"b": 2, "c": None},
        "same": [1],
        "also_b": 2,
        "commit": "y",
        "run": {"dir": "r", "seed": 3},
    }
    assert differences([left, None, right]) == {
        "a.b\nalso_b": ["1", "–", "2"],
        "a.c": ["0.0001", "–", "null"],
    }


def test_a_part_that_a_run_leaves_out_is_one_difference() -> None:
    assert differences([{"sam": {"width": 64, "layers": 2}}, {"sam": None}]) == {"sam": ["given", "null"]}


def test_alike() -> None:
    assert differences([{"a": 1}, {"a": 1}]) == {}
    assert differences([None, None]) == {}


def test_names_are_what_paths_do_not_share(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "0", tmp_path / "two" / "0"]
    assert name_runs(folders) == (tmp_path, ["one/0", "two/0"])


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "0", {"run": {"seed": 1}}, [3.0, 2.0, 1.5])
    write_run(tmp_path / "1", {"run": {"seed": 2}}, [3.0, 2.5, 1.25], mfu=0.4)
    (tmp_path / "2").mkdir()  # a job that was refused
    (tmp_path / "multirun.yaml").touch()
    assert main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    assert "picture:" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    runs = read_runs([tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(runs))
    lines = [line.split() for line in captured.get().splitlines()[-4:-1]]
    assert lines[0] == ["0", "complete,", "3", "steps", "1", "2.0000", "1.5000", "100", "–"]
    assert lines[1] == ["1", "complete,", "3", "steps", "2", "2.5000", "1.2500", "100", "40.0%"]
    assert lines[2] == ["2", "not", "begun,", "0", "steps", "–", "–", "–", "–", "–"]


def test_one_run_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: 1 run directories are given")


def test_no_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").touch()
    with pytest.raises(UserError, match="photos is no run directory"):
        read_runs([tmp_path / "photos", tmp_path / "other"])
