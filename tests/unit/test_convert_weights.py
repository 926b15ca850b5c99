"""Weights go in and come out bitwise, whatever layout they come in."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vl.checkpoint.convert import weight_files
from megatron_vl.checkpoint.convert.exporting import export_model
from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.convert.layouts import TRANSFORMERS, WHOLE_MODELS, layout_of
from megatron_vl.checkpoint.convert.matching import Source, match
from megatron_vl.checkpoint.convert.weight_files import WeightFiles
from megatron_vl.checkpoint.description import read_description
from megatron_vl.checkpoint.opening import open_model
from megatron_vl.checkpoint.streaming import read_tensors
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.device.machine import pick_device
from megatron_vl.model.shapes import parameter_shapes
from tests.support.ranks import run_ranks
from tests.support.releases import (
    IMAGE_TOKEN_ID,
    KINDS,
    image_size,
    pixel_inputs,
    release,
    stored_name,
)
from tests.support.vision_reference import in_our_names


@cache
def released(kind: str) -> tuple[Path, Path, Any]:
    """Folders of transformers and of the import, and the model. Not to be changed."""
    folder = Path(mkdtemp(prefix="release-"))
    model = release(folder / "source", kind)
    import_model(folder / "source", folder / "checkpoint")
    return folder / "source", folder / "checkpoint", model


def weights(folder: Path) -> dict[str, Tensor]:
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files.names()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def stored(checkpoint: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in read_tensors(checkpoint).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_are_bitwise(kind: str, tmp_path: Path) -> None:
    source, checkpoint, _ = released(kind)
    export_model(checkpoint, tmp_path / "export")
    assert same(weights(tmp_path / "export"), weights(source))
    import_model(tmp_path / "export", tmp_path / "again")
    assert same(stored(tmp_path / "again"), stored(checkpoint))
    assert read_description(tmp_path / "again") == read_description(checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_export_unchanged(kind: str, tmp_path: Path) -> None:
    _, checkpoint, model = released(kind)
    export_model(checkpoint, tmp_path / "export")
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    size = image_size(kind)
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    inputs = {"input_ids": torch.tensor([[5, *[IMAGE_TOKEN_ID] * 9, 7]]), **pixel_inputs(kind, images)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(prompt, add_generation_prompt=True) == (
        "<bos>User: <image_placeholder>What?\n\nAssistant:"
    )


def test_dtypes_are_kept(tmp_path: Path) -> None:
    source, _, _ = released("deepseek_vl")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights(source).items()}
    write_release(tmp_path / "source", source, half)
    import_model(tmp_path / "source", tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "export")
    assert same(weights(tmp_path / "export"), half)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


def write_release(
    folder: Path, like: Path, tensors: dict[str, Tensor], name: str = "model.safetensors"
) -> None:
    """A copy of a release with other weights."""
    folder.mkdir()
    for file in like.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, metadata={"format": "pt"})


def test_older_nesting(tmp_path: Path) -> None:
    source, checkpoint, _ = released("deepseek_vl_hybrid")
    nested = {
        name.replace("model.vision_model.", "model.vision_model.vision_model."): tensor
        for name, tensor in weights(source).items()
    }
    write_release(tmp_path / "source", source, nested)
    import_model(tmp_path / "source", tmp_path / "checkpoint")
    assert same(stored(tmp_path / "checkpoint"), stored(checkpoint))


def test_torch_files_are_read_without_unpickling(tmp_path: Path) -> None:
    source, checkpoint, _ = released("deepseek_vl")
    write_release(tmp_path / "source", source, weights(source), "pytorch_model.bin")
    import_model(tmp_path / "source", tmp_path / "checkpoint")
    assert same(stored(tmp_path / "checkpoint"), stored(checkpoint))


def test_pieces_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checkpoint, _ = released("deepseek_vl")
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 100_000)
    export_model(checkpoint, tmp_path / "export")
    pieces = list((tmp_path / "export").glob("model-*.safetensors"))
    assert len(pieces) > 3
    assert max(sum(t.nbytes for t in load_file(piece).values()) for piece in pieces) <= 100_000
    assert same(weights(tmp_path / "export"), weights(source))
    AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    import_model(tmp_path / "export", tmp_path / "again")
    assert same(stored(tmp_path / "again"), stored(checkpoint))


def in_official_names(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors in the official layout, with what the official files hold beside them."""
    tower = (
        "vision_model.vision_tower."
        if kind == "deepseek_vl"
        else "vision_model.vision_tower_low.vision_tower."
    )
    high = "vision_model.vision_tower_high.vision_tower."
    renames = (
        (r"^towers\.siglip\.patch_embed\.", f"{tower}patch_embed.proj."),
        (r"^towers\.siglip\.", tower),
        (r"^towers\.sam\.patch_embed\.", f"{high}patch_embed.proj."),
        (r"^towers\.sam\.hd_alpha", f"{high}hd_alpha_downsamples"),
        (r"^towers\.sam\.(blocks\.\d+\.mlp\.)fc", rf"{high}\1lin"),
        (r"^towers\.sam\.", high),
        (r"^aligner\.linear1\.", "aligner.layers.0."),
        (r"^aligner\.linear2\.", "aligner.layers.2."),
        (r"^adaptor\.", "aligner."),
    )
    official = {"language_model.lm_head.weight": state["lm_head.weight"]}
    inner = {
        name.removeprefix("model."): tensor for name, tensor in state.items() if name != "lm_head.weight"
    }
    for name, tensor in in_our_names(inner).items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        official[name] = tensor
    language = "language_model."
    official |= {
        f"{language}model.{name.removeprefix(language)}": tensor
        for name, tensor in inner.items()
        if name.startswith(language)
    }
    return official | {
        f"{tower}attn_pool.latent": torch.zeros(1, 1, 4),
        "vision_model.low_layer_norm.bias": torch.zeros(4),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_official_layout(kind: str, tmp_path: Path) -> None:
    source, checkpoint, _ = released(kind)
    official = {
        name: tensor.contiguous() for name, tensor in in_official_names(kind, weights(source)).items()
    }
    save_file(official, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    layout = layout_of(files.names(), WHOLE_MODELS, str(tmp_path))
    model = read_description(checkpoint).model
    entries = match(Source(files, layout), model, parameter_shapes(model))
    assert same({name: entry.read() for name, entry in entries.items()}, stored(checkpoint))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_rule_and_every_rule_an_inverse(kind: str) -> None:
    _, checkpoint, _ = released(kind)
    model = read_description(checkpoint).model
    shapes = parameter_shapes(model)
    rules = TRANSFORMERS.rules(model)
    assert sorted(rule.ours for rule in rules) == sorted(shapes)
    for rule in rules:
        values = torch.arange(shapes[rule.ours].numel()).reshape(shapes[rule.ours])
        assert torch.equal(rule.join.to_ours(rule.join.to_theirs(values, model), model), values), rule.ours


def test_shapes_are_those_of_the_built_model() -> None:
    _, checkpoint, _ = released("deepseek_vl_hybrid")
    (built,) = run_ranks(1, _built_shapes, checkpoint)
    model = read_description(checkpoint).model
    assert {stored_name(name): shape for name, shape in built.items()} == parameter_shapes(model)


def _built_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    (chunk,) = open_model(checkpoint, ParallelConfig(), "fp32", pick_device(0)).chunks
    return {name: parameter.shape for name, parameter in chunk.named_parameters()}
