"""What cannot be converted is told in one message, and nothing is left half-written."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.convert import convert
from megatron_vl.checkpoint.convert import aside
from megatron_vl.checkpoint.convert.aside import whole_folder
from megatron_vl.checkpoint.convert.exporting import export_model
from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.convert.resharding import reshard
from megatron_vl.checkpoint.description import DESCRIPTION_FILE, check_same_weights, read_description
from megatron_vl.config.convert import ConvertConfig, PartsConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig
from tests.support.releases import release


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "source"
    release(folder, "deepseek_vl")
    import_model(folder, folder.with_name("checkpoint"))
    return folder


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "source")
    return tmp_path / "source"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def overlapping_offsets(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    tampered = json.dumps(header).encode().ljust(size)
    path.write_bytes(data[:8] + tampered[:size] + data[8 + size :])


def code_in_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": os.system}, file)


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_piece(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))


def other_depth(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, ["model.safetensors", "no whole safetensors file"]),
        (huge_header, ["model.safetensors", "no whole safetensors file"]),
        (overlapping_offsets, ["model.safetensors", "no whole safetensors file"]),
        (code_in_pickle, ["pytorch_model.bin", "safetensors"]),
        (index_outside, ["model.safetensors.index.json", "outside.safetensors", "not beside it"]),
        (missing_piece, ["model-00001-of-00002.safetensors"]),
        (
            lambda f: (
                missing_piece(f),
                (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            ),
            ["model.safetensors.index.json", 'no "weight_map"'],
        ),
        (lambda f: (f / "model.safetensors").unlink(), ["has no weights", "model.safetensors"]),
        (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "no JSON"]),
        (lambda f: (f / "tokenizer.json").write_text('{"model": 3}'), ["tokenizer.json"]),
        (other_width, ["of another shape", "layers.3.mlp.up_proj.weight [96, 64]", "[128, 64]"]),
        (other_depth, ["unknown: model.language_model.layers.3.input_layernorm.weight"]),
        (
            lambda f: change_weights(f, lambda t: t.pop("model.aligner.linear2.bias")),
            ["missing: model.aligner.linear2.bias"],
        ),
        (
            lambda f: change_weights(f, lambda t: t.update({"model.extra": torch.zeros(1)})),
            ["unknown: model.extra"],
        ),
        (
            lambda f: change_weights(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()})),
            ["lm_head.weight", "I32", "BF16"],
        ),
        (
            lambda f: change_weights(f, lambda t: (t.clear(), t.update({"weight": torch.zeros(1)}))),
            ["unknown layout", "transformers", "official DeepSeek-VL"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_source(
    spoil: Callable[[Path], object], words: list[str], source: Path, tmp_path: Path
) -> None:
    spoil(source)
    with pytest.raises(UserError) as raised:
        import_model(source, tmp_path / "checkpoint")
    for word in words:
        assert word in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "outside.safetensors") == [
        "source"
    ]


def test_an_output_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        import_model(source, tmp_path / "there")
    assert (tmp_path / "there" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (ConvertConfig(direction="export", checkpoint="a", vocab_size=400), "vocab_size"),
        (ConvertConfig(direction="import", source="a", adaptor="mlp_gelu"), "adaptor"),
        (ConvertConfig(direction="import", parts=PartsConfig(sam="b"), checkpoint="a"), "checkpoint"),
        (
            ConvertConfig(direction="export", checkpoint="a", parallel=ParallelConfig(tensor_size=2)),
            "parallel",
        ),
    ],
)
def test_what_a_direction_does_not_read_is_refused(given: ConvertConfig, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{word}: not read by {given.direction}"):
        convert(replace(given, output=str(tmp_path / "output")))


def test_an_output_that_cannot_be_named_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output=.* cannot be written"):
        import_model(source, tmp_path / ("n" * 300))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"output=.*link exists"):
        import_model(source, tmp_path / "link")


@pytest.mark.parametrize("convert", [import_model, export_model])
def test_a_full_disk_leaves_nothing(
    convert: Callable[[Path, Path], object], original: Path, tmp_path: Path
) -> None:
    """A limit on a file's size stands for the disk's: the write fails in the same place."""
    start = original if convert is import_model else original.with_name("checkpoint")
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            convert(start, tmp_path / "output")
        except UserError as error:
            os._exit(0 if "output" in str(error) and "cannot be written" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(aside.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"needs 0.00 GB, its disk has 0.00 GB free"):
        import_model(original, tmp_path / "output")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "output", 1) as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_is_cleared_away(source: Path, tmp_path: Path) -> None:
    left = aside.aside_of(tmp_path / "checkpoint")
    left.mkdir()
    (left / "half").write_text("half")
    import_model(source, tmp_path / "checkpoint")
    assert not left.exists()
    assert not (tmp_path / "checkpoint" / "half").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "shared_mlp_gelu"}, ["model.vision.adaptor.kind=shared_mlp_gelu"]),
        ({"depth": 3}, ["model.vision.adaptor.depth=3"]),
    ],
)
def test_what_transformers_has_not_is_not_exported(
    change: dict[str, object], words: list[str], original: Path, tmp_path: Path
) -> None:
    shutil.copytree(original.with_name("checkpoint"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["model"]["vision"]["adaptor"] |= change
    path.write_text(json.dumps(description))
    with pytest.raises(UserError) as raised:
        export_model(tmp_path / "checkpoint", tmp_path / "export")
    for word in words:
        assert word in str(raised.value)


def test_a_checkpoint_without_a_tensor_is_not_exported(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original.with_name("checkpoint"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["model"]["language"]["num_layers"] = 5
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"layers\.4\.mlp"):
        export_model(tmp_path / "checkpoint", tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(tensor_size=3), ["parallel.tensor_size=3"]),
        (ParallelConfig(pipeline_size=2, layout="Et|tL"), ["parallel.layout", "4"]),
        (ParallelConfig(pipeline_size=9), ["parallel.pipeline_size=9"]),
        (ParallelConfig(), ["no optimizer state"]),
    ],
)
def test_what_cannot_be_resharded(
    parallel: ParallelConfig, words: list[str], original: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        reshard(original.with_name("checkpoint"), tmp_path / "output", parallel)
    for word in words:
        assert word in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_named(original: Path) -> None:
    checkpoint = original.with_name("checkpoint")
    stored = read_description(checkpoint).model
    check_same_weights(checkpoint, stored, replace(stored, name="another name"))
    wanted = replace(stored, language=replace(stored.language, ffn_hidden_size=128, num_layers=5))
    with pytest.raises(UserError) as raised:
        check_same_weights(checkpoint, stored, wanted)
    assert "model.language.ffn_hidden_size=128 (the checkpoint has 96)" in str(raised.value)
    assert "model.language.num_layers=5 (the checkpoint has 4)" in str(raised.value)
