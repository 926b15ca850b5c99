"""Bad input gets one clear message that names what is wrong, as the last thing on screen, a non-zero exit, no hang."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import build_data, command, finish, metrics
from tests.support.tiny_data import write_tokenizer

SHORT = ["stages=[adaptor]", "train.steps=2", "heldout.max_samples=0"]


def refused(arguments: list[str], *words: str) -> str:
    """Run; the last line on screen is the one error, and it holds all `words`."""
    status, output = finish(arguments, timeout_seconds=120)
    assert status != 0, output
    last = output.rstrip().splitlines()[-1]
    for word in words:
        assert word in last, output
    assert output.count(last) == 1, "said more than once"
    assert "Traceback" not in output
    return last


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.num_processes=3", "parallel.tensor_size=2"], ["parallel.tensor_size=2", "3 ranks"]),
        (["parallel.tensor_size=3", "run.num_processes=3"], ["parallel.tensor_size=3", "num_heads=4"]),
        (["model.language.num_heads=5"], ["hidden_size=128", "num_heads=5"]),
        (["train.micro_batch_size=3"], ["train.global_batch_size=4", "micro_batch_size"]),
        (["run.num_processes=3"], ["train.global_batch_size=4", "3"]),
        (["parallel.pipeline_size=2", "parallel.layout='Et|ttL'"], ["parallel.layout='Et|ttL'", "4 t"]),
        (["parallel.pipeline_size=2", "parallel.layout='Ettt|tttL'"], ["parallel.layout", "4 t"]),
        (["parallel.pipeline_size=2", "parallel.layout='EttttL'"], ["parallel.layout", "2"]),
        (["parallel.virtual_size=2"], ["parallel.virtual_size=2", "parallel.pipeline_size"]),
        (["train.precision=fp16"], ["train.precision=fp16", "bf16"]),
        (["stages=[warm]"], ["stages", "warm", "adaptor, joint, sft"]),
        (["stage.adaptor.train=[aligner]"], ["stage.adaptor.train=aligner", "adaptor"]),
        (["data.text_ratio=1.5"], ["data.text_ratio=1.5", "0 to 1"]),
        (["model.language.vocab_size=64"], ["data.tokenizer", "model.language.vocab_size=64"]),
        (["+stage.adaptor.sources.pictures=1.0"], ["stage.adaptor.sources", "pictures"]),
        (["data.root=/nowhere"], ["/nowhere", "python -m data_tools.build data=quickstart"]),
        (["checkpoint.initial=/nowhere"], ["checkpoint.initial=/nowhere"]),
        (["data.max_image_pixels=100"], ["data.max_image_pixels"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_value(overrides: list[str], words: list[str], data_root: Path, tmp_path: Path) -> None:
    refused(command(data_root, tmp_path / "run", *SHORT, *overrides), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.global_batch_size=12", "data.lanes=4", "run.num_processes=3"],
            ["data-parallel size 3", "data.lanes"],
        ),
        (["stages=[joint]", "stage.joint.sources.text=0"], ["stage.joint.text_ratio", "text steps"]),
        (["stages=[joint]", "stage.joint.grouping=never"], ["stage.joint.grouping", "never"]),
        (["node_check.min_matmul_share=2"], ["node_check.min_matmul_share=2"]),
        (["parallel.fp8=true", "parallel.transformer_engine=false"], ["parallel.fp8=true"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_is_refused_before_ranks_are_asked_for(
    overrides: list[str], words: list[str], data_root: Path, tmp_path: Path
) -> None:
    arguments = command(data_root, tmp_path / "run", *SHORT, *overrides)
    arguments[2] = "launch.check"
    refused(arguments, *words)


def test_unknown_override(data_root: Path, tmp_path: Path) -> None:
    status, output = finish(command(data_root, tmp_path / "run", *SHORT, "train.stepz=3"))
    assert status != 0
    assert "stepz" in output
    assert "Traceback" not in output


def empty_shard(folder: Path) -> None:
    next(folder.glob("*.tar")).write_bytes(b"")


def missing_shard(folder: Path) -> None:
    next(folder.glob("*.tar")).unlink()


def changed_shard(folder: Path) -> None:
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-5120])


def other_tokenizer(folder: Path) -> None:
    write_tokenizer(folder.parent / "tokenizer.json", text="quite other words for it", vocab_size=300)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty_shard, [".tar"]),
        (missing_shard, [".tar"]),
        (changed_shard, [".tar"]),
        (other_tokenizer, ["tokenizer", "data_tools.index"]),
    ],
)
def test_shard(damage: Callable[[Path], None], words: list[str], data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    damage(root / "pages")
    refused(command(root, tmp_path / "run", *SHORT), *words)


def damage_images(root: Path, source: str, num_images: int) -> None:
    """Overwrite the pixels of the first images of a source, behind their headers; the index stays true."""
    shard = next((root / source).glob("*.tar"))
    data = bytearray(shard.read_bytes())
    start = 0
    for _ in range(num_images):
        start = data.index(b"IDAT", start) + 4
        data[start : start + 200] = bytes(200)
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("pipeline_size", "placement"),
    [
        pytest.param(1, "replicated", marks=pytest.mark.slow),
        pytest.param(2, "replicated", marks=pytest.mark.slow),
        (2, "spread"),  # either stage may be the one that finds out
    ],
)
def test_images_that_do_not_decode_are_masked_and_counted(
    pipeline_size: int, placement: str, data_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    damage_images(root, "pages", 40)
    damage_images(root, "heldout/pages", 2)
    arguments = command(
        root,
        tmp_path / "run",
        *SHORT,
        f"parallel.pipeline_size={pipeline_size}",
        f"parallel.vision_placement={placement}",
        "stage.adaptor.sources.photographs=0",
    )
    status, output = finish([*arguments, "data.max_failed_fraction=1.0", "heldout.max_samples=4"])
    assert status == 0, output
    uses = map(json.loads, (tmp_path / "run" / "image_use.jsonl").read_text().splitlines())
    (use,) = [row for row in uses if row["source"] == "pages"]
    assert use["num_samples"] == 2  # of four
    shown = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert sum(sample["source"] == "pages" for sample in shown) == 1  # of three
    rows = metrics(tmp_path / "run")
    assert all(0 < row["num_failed_samples"] < row["num_samples"] for row in rows)
    clean = command(data_root, tmp_path / "clean", *arguments[arguments.index("stages=[adaptor]") :])
    assert finish(clean)[0] == 0
    for damaged, whole in zip(rows, metrics(tmp_path / "clean"), strict=True):
        assert damaged["num_tokens"] == whole["num_tokens"], "the plan has changed"
        assert damaged["num_supervised_tokens"] < whole["num_supervised_tokens"]
    assert np.isfinite([row["loss"] for row in rows]).all()

    refused(
        [*arguments, "run.dir=" + str(tmp_path / "strict"), "train.steps=20"], "data.max_failed_fraction=0.01"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run.seed=2", ["run.seed=2", "1234"]),
        ("train.global_batch_size=8", ["train.global_batch_size=8"]),
        ("data.text_ratio=0.2", ["data.text_ratio=0.2"]),
        ("data.root", ["data.sources", "digest"]),
    ],
)
def test_resume_with_other_values(change: str, words: list[str], stopped_run: Path, tmp_path: Path) -> None:
    run, root = stopped_run / "run", stopped_run / "data"
    overrides = [change]
    if change == "data.root":
        other = tmp_path / "other"
        build_data(other, num_samples=44)
        root, overrides = other, []
    before = sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").rglob("*"))
    refused(command(root, run, *SHORT, *overrides), *words)
    assert sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").rglob("*")) == before


@pytest.fixture(scope="module")
def stopped_run(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(data_root, folder / "data")
    status, output = finish(command(folder / "data", folder / "run", *SHORT, "train.stop_at=1"))
    assert status == 0, output
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "stopped"
    return folder
