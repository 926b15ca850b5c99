"""What a source's config.json and tokenizer say; models made of several sources."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from megatron_vl.checkpoint.convert.importing import import_model, import_parts
from megatron_vl.checkpoint.convert.source_config import read_parts, read_source_model
from megatron_vl.checkpoint.description import read_description
from megatron_vl.checkpoint.streaming import read_tensors
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.data.text import TextRule
from megatron_vl.model.encoders import initialize_vision
from megatron_vl.model.initialize import generator
from megatron_vl.model.shapes import vision_without_values
from tests.support.releases import VOCAB_SIZE, release
from tests.support.tiny_data import IMAGE, write_tokenizer

CONFIGS = Path(__file__).parents[2] / "hydra_conf" / "model"
# The released configurations, as far as they say what the model is.
OFFICIAL_LANGUAGE = {"model_type": "llama", "max_position_embeddings": 16384, "vocab_size": 102400}
OFFICIAL_1B: dict[str, Any] = {
    "model_type": "multi_modality",
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1},
    },
    "aligner_config": {
        "params": {"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"}
    },
    "language_config": {
        **OFFICIAL_LANGUAGE,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
    },
}
OFFICIAL_7B: dict[str, Any] = {
    "model_type": "multi_modality",
    "vision_config": {
        "cls": "HybridVisionTower",
        "params": {
            "concat_type": "tuple",
            "low_res_cfg": {"image_size": 384, "model_name": "siglip_large_patch16_384"},
            "high_res_cfg": {"image_size": 1024, "model_name": "sam_b_downsample"},
        },
    },
    "aligner_config": {"params": {"depth": 2, "projector_type": "low_high_hybrid_split_mlp_gelu"}},
    "language_config": {**OFFICIAL_LANGUAGE, "num_hidden_layers": 30},
}
TRANSFORMERS_7B: dict[str, Any] = {
    "model_type": "deepseek_vl_hybrid",
    "image_token_id": 100015,
    "text_config": {**OFFICIAL_LANGUAGE, "num_hidden_layers": 30, "rope_parameters": {"rope_theta": 10000.0}},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 384,
        "hidden_act": "gelu",
        "vision_use_head": False,
    },
    "high_res_vision_config": {"model_type": "sam_vision_model"},
}


def composed(name: str) -> ModelConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    model: ModelConfig = OmegaConf.to_object(merged)
    return model


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (OFFICIAL_1B, "deepseek_vl_1b"),
        (OFFICIAL_7B, "deepseek_vl_7b"),
        (TRANSFORMERS_7B, "deepseek_vl_7b"),
    ],
)
def test_a_released_config_is_our_model(values: dict[str, Any], name: str, tmp_path: Path) -> None:
    source = read_source_model(write_config(tmp_path, values))
    expected = composed(name)
    assert replace(source.model, name=expected.name) == expected
    assert source.image_token_id == 100015


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2_vl"}, ["model_type", "qwen2_vl", "deepseek_vl_hybrid"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "num_key_value_heads": 8}}, ["num_key_value_heads", "32"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "hidden_act": "gelu"}}, ["hidden_act", "silu"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "tie_word_embeddings": True}}, ["tie_word_embeddings"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "hidden_size": "wide"}}, ["hidden_size", "wide", "int"]),
        (
            {"text_config": {**OFFICIAL_LANGUAGE, "rope_parameters": {"rope_type": "yarn"}}},
            ["rope_type", "yarn", "default"],
        ),
        (
            {"text_config": {**OFFICIAL_LANGUAGE, "rope_scaling": {"type": "linear", "factor": 4.0}}},
            ["rope_scaling", "linear"],
        ),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, ["vision_config.hidden_act", "gelu"]),
        ({"text_config": None}, ["text_config"]),
        ({"image_token_id": "<image>"}, ["image_token_id"]),
        ({"model_type": ["deepseek_vl"]}, ["model_type"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "num_attention_heads": 0}}, ["num_attention_heads is 0"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "num_hidden_layers": 10**9}}, ["num_hidden_layers", "1000"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "vocab_size": 10**20}}, ["vocab_size", "at most"]),
        ({"text_config": {**OFFICIAL_LANGUAGE, "rms_norm_eps": float("nan")}}, ["rms_norm_eps is nan"]),
        ({"high_res_vision_config": {"mlp_dim": "wide"}}, ["mlp_dim", "int"]),
        (OFFICIAL_7B | {"vision_config": None}, ["vision_config must be an object"]),
        (OFFICIAL_7B | {"aligner_config": {"params": []}}, ["params must be an object"]),
        (
            OFFICIAL_7B | {"vision_config": {"params": {"high_res_cfg": {}}}},
            ["low_res_cfg must be an object"],
        ),
        (OFFICIAL_1B | {"vision_config": {"params": {"model_name": []}}}, ["model_name", "siglip_large"]),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        read_source_model(write_config(tmp_path, TRANSFORMERS_7B | change))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(raised.value)


def test_a_config_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        read_source_model(tmp_path)


def test_key_value_heads_may_be_left_to_their_default(tmp_path: Path) -> None:
    values = {
        **TRANSFORMERS_7B,
        "text_config": {**TRANSFORMERS_7B["text_config"], "num_key_value_heads": None},
    }
    assert read_source_model(write_config(tmp_path, values)).model.language.num_heads == 32


def stored(checkpoint: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in read_tensors(checkpoint).items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model whose tokenizer knows no images, a SigLIP and a SAM, as transformers saves them."""
    root = tmp_path_factory.mktemp("parts")
    text = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(text).save_pretrained(root / "language")
    write_tokenizer(root / "language" / "tokenizer.json", vocab_size=300)
    path = root / "language" / "tokenizer.json"
    path.write_text(path.read_text().replace(IMAGE, "<another>"))
    (root / "language" / "tokenizer_config.json").write_text(
        '{"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}'
    )
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 16}
    low = SiglipVisionConfig(**sizes, intermediate_size=64, num_hidden_layers=2, image_size=48)
    siglip = SiglipConfig(
        vision_config=low.to_dict(),
        text_config={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    )
    SiglipModel(siglip).save_pretrained(root / "siglip")
    high = SamVisionConfig(
        **sizes,
        mlp_dim=64,
        num_hidden_layers=3,
        image_size=128,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=16,
    )
    SamModel(SamConfig(vision_config=high.to_dict())).save_pretrained(root / "sam")
    return {name: root / name for name in ("language", "siglip", "sam")}


def test_separate_sources_become_one_model(parts: dict[str, Path], tmp_path: Path) -> None:
    model = read_parts(parts, None)
    imported = import_parts(parts, model, 7, tmp_path / "checkpoint")
    ours = stored(tmp_path / "checkpoint")
    language = LlamaForCausalLM.from_pretrained(parts["language"]).state_dict()
    siglip = SiglipModel.from_pretrained(parts["siglip"]).state_dict()
    sam = SamModel.from_pretrained(parts["sam"]).state_dict()
    expected = {
        "language.head.weight": language["lm_head.weight"],
        "language.block.layers.1.mlp.linear_fc2.weight": language["model.layers.1.mlp.down_proj.weight"],
        "stage_zero.towers.siglip.norm.weight": siglip["vision_model.post_layernorm.weight"],
        "stage_zero.towers.sam.blocks.2.attn.rel_pos_h": sam["vision_encoder.layers.2.attn.rel_pos_h"],
        "stage_zero.towers.sam.neck_hd.2.weight": sam["vision_encoder.neck.conv2.weight"],
        "stage_zero.towers.sam.hd_alpha": torch.zeros(1),
    }
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    # What is fresh is what a run of this seed begins with.
    fresh = vision_without_values(model).to_empty(device="cpu")
    initialize_vision(fresh, lambda name: generator(7, f"stage_zero.{name}"))
    for name in ("adaptor.high_up_proj.weight", "adaptor.layers.1.bias", "towers.sam.downsamples.0.weight"):
        assert torch.equal(ours[f"stage_zero.{name}"], fresh.get_parameter(name)), name
    assert imported.model.vision.adaptor.kind == "hybrid_mlp_gelu"


def test_a_siglip_of_another_activation_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((parts["siglip"] / "config.json").read_text())
    values["vision_config"]["hidden_act"] = "relu"
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        read_parts({**parts, "siglip": write_config(tmp_path, values)}, None)


def test_a_text_only_tokenizer_gets_the_image_token(parts: dict[str, Path], tmp_path: Path) -> None:
    import_parts(parts, read_parts(parts, None), 7, tmp_path / "checkpoint")
    description = read_description(tmp_path / "checkpoint")
    assert description.tokens is not None
    rule = TextRule(tmp_path / "checkpoint" / "tokenizer" / "tokenizer.json", **vars(description.tokens))
    assert rule.image_id == description.image_token_id == rule.vocab_size - 1


def test_towers_in_single_files_are_the_released_ones(parts: dict[str, Path], tmp_path: Path) -> None:
    save_file({"norm.weight": torch.zeros(4)}, tmp_path / "siglip.safetensors")
    folders = {"language": parts["language"], "siglip": tmp_path / "siglip.safetensors"}
    model = read_parts(folders, None)
    assert model.vision == composed("deepseek_vl_1b").vision
    with pytest.raises(UserError, match="SigLIP of timm"):
        import_parts(folders, model, 7, tmp_path / "checkpoint")


def test_the_vocabulary_is_padded_with_the_mean(tmp_path: Path) -> None:
    model = release(tmp_path / "source", "deepseek_vl")
    imported = import_model(tmp_path / "source", tmp_path / "checkpoint", vocab_size=VOCAB_SIZE + 8)
    ours = stored(tmp_path / "checkpoint")
    for name, theirs in (
        ("stage_zero.embedding.weight", model.get_input_embeddings().weight),
        ("language.head.weight", model.lm_head.weight),
    ):
        assert torch.equal(ours[name][:VOCAB_SIZE], theirs)
        assert torch.allclose(ours[name][VOCAB_SIZE:], theirs.mean(0).expand(8, -1), atol=1e-7)
    assert read_description(tmp_path / "checkpoint").model.language.vocab_size == VOCAB_SIZE + 8
    assert any("padded from 336 to 344" in notice for notice in imported.notices)


def test_a_tokenizer_larger_than_the_vocabulary_is_told_what_to_do(tmp_path: Path) -> None:
    release(tmp_path / "source", "deepseek_vl")
    write_tokenizer(
        tmp_path / "source" / "tokenizer.json",
        text=" ".join(map(str, range(1000))),
        vocab_size=VOCAB_SIZE + 5,
    )
    with pytest.raises(UserError, match=r"341 entries.*336; pad it with vocab_size=384"):
        import_model(tmp_path / "source", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_an_image_id_outside_the_vocabulary_is_kept_with_a_warning(tmp_path: Path) -> None:
    release(tmp_path / "source", "deepseek_vl")
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"image_token_id": 100015}
    write_config(tmp_path / "source", config)
    imported = import_model(tmp_path / "source", tmp_path / "checkpoint")
    assert any("100015 is outside the vocabulary" in notice for notice in imported.notices)
    assert read_description(tmp_path / "checkpoint").image_token_id == 100015
