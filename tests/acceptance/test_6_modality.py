"""What a run realises: every global batch of one modality, the text share within one batch of its schedule."""

import json
from itertools import accumulate
from pathlib import Path

import pytest

from tests.support.runs import command, finish, metrics


@pytest.mark.parametrize(
    ("ratio", "warmup", "steps"),
    [
        pytest.param(0.5, 0.0, 8, id="half", marks=pytest.mark.slow),
        pytest.param(0.7, 0.5, 12, id="with_warmup"),
    ],
)
def test_realised_ratio_follows_the_schedule(
    ratio: float, warmup: float, steps: int, data_root: Path, tmp_path: Path
) -> None:
    status, output = finish(
        command(
            data_root,
            tmp_path,
            "stages=[joint]",
            f"train.steps={steps}",
            f"data.text_ratio={ratio}",
            f"data.warmup_fraction={warmup}",
            "heldout.max_samples=0",
        )
    )
    assert status == 0, output

    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    realised = accumulate(row["modality"] == "text" for row in rows)
    scheduled = accumulate(row["text_ratio"] for row in rows)
    assert all(abs(text - target) < 1 for text, target in zip(realised, scheduled, strict=True))
    assert rows[-1]["text_ratio"] == pytest.approx(ratio)
    if warmup:
        assert rows[0]["text_ratio"] > ratio
    else:
        assert {row["text_ratio"] for row in rows} == {ratio}
    assert {row["modality"] for row in rows} == {"text", "multimodal"}
    for row in rows:
        assert (row["num_images"] > 0) == (row["modality"] == "multimodal")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "complete"
