"""Weights leave a run for transformers and come back; a run goes on at other parallel sizes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vl.checkpoint.convert.exporting import export_model
from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.streaming import read_tensors
from tests.support.runs import command, finish, losses

STEPS = ["stages=[joint]", "train.steps=4", "heldout.max_samples=0"]
LAYOUT = ["parallel.pipeline_size=2", 'parallel.layout="Et|tttL"']
OTHER = ["parallel.tensor_size=2", "parallel.sequence_parallel=true"]


def run(arguments: list[str]) -> str:
    status, output = finish(arguments)
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(command(data_root, folder, *STEPS))
    return folder


def test_out_to_transformers_and_back_into_training(data_root: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint = whole / "checkpoints" / "joint-00000004"
    export_model(checkpoint, tmp_path / "exported")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    assert model.dtype == torch.float32
    AutoProcessor.from_pretrained(tmp_path / "exported")
    import_model(tmp_path / "exported", tmp_path / "imported")
    trained, back = read_tensors(checkpoint), read_tensors(tmp_path / "imported")
    assert back.keys() < trained.keys()
    assert all(torch.equal(entry.read(), trained[name].read()) for name, entry in back.items())
    described = [
        json.loads((path / "model.json").read_text()) for path in (checkpoint, tmp_path / "imported")
    ]
    assert described[0]["model"]["language"] == described[1]["model"]["language"]
    assert described[0]["tokens"] == described[1]["tokens"]
    initial = f"checkpoint.initial={tmp_path / 'imported'}"
    run(
        command(
            data_root,
            tmp_path / "next",
            *LAYOUT,
            "stages=[sft]",
            "train.steps=1",
            "heldout.max_samples=0",
            initial,
        )
    )
    ((_, loss, _),) = losses(tmp_path / "next")
    assert loss < losses(whole)[0][1] - 0.5, "it began with other weights"


@pytest.fixture(scope="module")
def halfway(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the four steps, under an uneven pipeline. Not to be changed."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    run(command(data_root, folder, *STEPS, *LAYOUT, "train.stop_at=2"))
    return folder


@pytest.fixture(scope="module")
def resumed(data_root: Path, halfway: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other two steps under tensor parallelism, from the pipeline's checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(halfway, folder)
    run(command(data_root, folder, *STEPS, *OTHER))
    return folder


def test_a_run_goes_on_at_other_parallel_sizes(whole: Path, resumed: Path) -> None:
    """Two steps under an uneven pipeline, two under tensor parallelism; against four in one process."""
    rows, expected = losses(resumed), losses(whole)
    assert [step for step, _, _ in rows] == [1, 2, 3, 4]
    for (_, loss, norm), (_, expected_loss, expected_norm) in zip(rows[2:], expected[2:], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_a_resharded_checkpoint_goes_on_as_the_one_it_was_made_of(
    data_root: Path, halfway: Path, resumed: Path, tmp_path: Path
) -> None:
    name = "checkpoints/joint-00000002"
    overrides = [f"checkpoint={halfway / name}", f"output={tmp_path / name}", *OTHER]
    output = run([*command(Path(), Path())[:2], "launch.convert", "direction=reshard", *overrides])
    assert "for TP 2, PP 1" in output
    run(command(data_root, tmp_path, *STEPS, *OTHER))
    assert losses(tmp_path) == losses(resumed)[2:]
