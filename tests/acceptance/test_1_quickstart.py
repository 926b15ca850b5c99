"""The quickstart: all three stages train, the held-out loss falls, the image is used, and the report is written."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import CHECKOUT, command, finish, metrics

LIMIT_SECONDS = 12 * 60


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run(run: Path) -> None:
    """What every finished run through the three stages leaves."""
    assert json.loads((run / "status.json").read_text()) == {
        "state": "complete",
        "stage": "sft",
        "step": metrics(run)[-1]["step"],
        "message": "",
    }
    assert [row["global_step"] for row in metrics(run)] == list(range(1, len(metrics(run)) + 1))
    assert {row["stage"] for row in metrics(run)} == {"adaptor", "joint", "sft"}
    heldout = rows(run / "heldout.jsonl")
    for stage in ("adaptor", "joint", "sft"):
        sources = {row["source"] for row in heldout if row["stage"] == stage and row["step"] == 0}
        assert sources
        assert sources == {row["source"] for row in heldout if row["stage"] == stage and row["step"] > 0}
    config = yaml.safe_load((run / "config_resolved.yaml").read_text())
    assert config["commit"]
    assert config["environment"]["torch"]
    for row in rows(run / "timeline.jsonl"):
        assert 0 <= row["bubble_fraction"] < 1
        assert {event["kind"] for event in row["events"]} == {"forward", "backward"}
    page = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the report loads something"
    for words in ("held-out", "image", "bubble", "text and multimodal batches"):
        assert words in page.lower(), words


def test_a_short_run_leaves_everything(data_root: Path, tmp_path: Path) -> None:
    status, output = finish(
        command(
            data_root, tmp_path / "run", "experiment=quickstart", "train.steps=3", f"run.dir={tmp_path}/run"
        )
    )
    assert status == 0, output
    assert f"{tmp_path}/run/report.html" in output
    check_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_make_quickstart_in_a_fresh_clone(tmp_path: Path) -> None:
    """Installation, data and training within 12 minutes on 2 cores; the figures that the README promises."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(clone)], check=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))
    }
    began = time.monotonic()
    result = subprocess.run(
        ["make", "quickstart"],
        check=False,
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - began < LIMIT_SECONDS

    run = clone / "runs" / "quickstart"
    assert str(run / "report.html") in result.stdout
    check_run(run)
    joint = {
        (row["source"], row["step"] == 0): row["loss"]
        for row in rows(run / "heldout.jsonl")
        if row["stage"] == "joint"
    }
    assert joint["text", False] < 0.9 * joint["text", True]
    for source in ("pages", "figures"):
        (use,) = [
            row
            for row in rows(run / "image_use.jsonl")
            if row["stage"] == "joint" and row["source"] == source
        ]
        assert use["low"] > 0, use
