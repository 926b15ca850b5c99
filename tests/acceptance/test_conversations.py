"""A file of conversations, as users have them, is built, verified and trained on with three commands."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.conversations import write_raw
from tests.support.runs import command, finish, losses
from tests.support.tiny_data import BOS, EOS

NUM_RECORDS = 60


def data_overrides(folder: Path) -> list[str]:
    """What a user changes in a copy of hydra_conf/data/conversations.yaml."""
    raw = "data.sources.conversations.raw"
    return [
        "data=conversations",
        f"data.root={folder}/data",
        f"data.tokenizer={folder}/raw/tokenizer.json",
        f"{raw}.file={folder}/raw/records.json",
        f"{raw}.images={folder}/raw/images",
        f"{raw}.heldout_fraction=0.2",
        "data.lanes=4",
    ]


def data_tool(name: str, overrides: list[str]) -> tuple[int, str]:
    tokens = [f"data.bos_token='{BOS}'", f"data.eos_token='{EOS}'"]
    return finish([sys.executable, "-m", f"data_tools.{name}", *overrides, *tokens])


@pytest.mark.slow
def test_built_verified_trained(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", NUM_RECORDS)
    overrides = data_overrides(tmp_path)
    status, output = data_tool("build", overrides)
    assert status == 0, output
    indexes = [
        json.loads((tmp_path / "data" / folder / "conversations" / "index.json").read_text())
        for folder in (".", "heldout")
    ]
    num_samples = [index["num_samples"] for index in indexes]
    assert sum(num_samples) == NUM_RECORDS
    status, output = data_tool("verify", overrides)
    assert status == 0, output
    assert "all samples decode" in output

    sources = {"conversations": 1, "chat_pages": 0, "chat_figures": 0, "chat_text": 0, "text": 0}
    run = tmp_path / "run"
    arguments = command(
        tmp_path / "data",
        run,
        *overrides,
        "stages=[sft]",
        "train.steps=2",
        "stage.sft.text_ratio=0",
        "heldout.max_samples=1",
        *(f"++stage.sft.sources.{name}={weight}" for name, weight in sources.items()),
    )
    status, output = finish(arguments)
    assert status == 0, output
    assert [step for step, _, _ in losses(run)] == [1, 2]
    heldout = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    assert any("conversations" in json.dumps(row) for row in heldout)
