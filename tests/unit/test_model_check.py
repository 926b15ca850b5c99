"""What the checks of a model refuse, naming the field; the model configs that ship."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import (
    AdaptorConfig,
    LanguageConfig,
    ModelConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)
from megatron_vl.config.model_check import (
    ADAPTOR_TOWERS,
    check_model,
    image_size,
    largest_tower,
    tokens_per_image,
)

CONFIGS = Path(__file__).parents[2] / "hydra_conf" / "model"
HYBRID = AdaptorConfig(kind="hybrid_mlp_gelu")
POOLING = "pool_height_mlp_gelu"
LANGUAGE = LanguageConfig(
    hidden_size=64, num_layers=2, num_heads=4, ffn_hidden_size=96, vocab_size=128, max_positions=64
)


def read(name: str) -> ModelConfig:
    values = OmegaConf.load(CONFIGS / f"{name}.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(model, ModelConfig)
    return model


def make(
    sam: dict[str, Any] | None = None,
    siglip: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    **vision: Any,
) -> ModelConfig:
    """The full-size towers over a small decoder, with changes."""
    towers = VisionConfig(siglip=SiglipConfig(**(siglip or {})), sam=SamConfig(**(sam or {})), adaptor=HYBRID)
    return ModelConfig(language=replace(LANGUAGE, **(language or {})), vision=replace(towers, **vision))


def alone(kind: str) -> ModelConfig:
    """SigLIP without SAM."""
    model = make(adaptor=AdaptorConfig(kind=kind))
    return replace(model, vision=replace(model.vision, sam=None))


@pytest.mark.parametrize("kind", [kind for kind, towers in ADAPTOR_TOWERS.items() if towers == 2])
def test_every_adaptor_keeps_the_number_of_tokens(kind: str) -> None:
    model = make(adaptor=AdaptorConfig(kind=kind))
    check_model(model)
    assert tokens_per_image(model) == 576


@pytest.mark.parametrize("left_out", ["sam", "siglip"])
def test_a_tower_may_stand_alone(left_out: str) -> None:
    model = make()
    alone = replace(model.vision, adaptor=AdaptorConfig(), **{left_out: None})
    check_model(replace(model, vision=alone))
    assert tokens_per_image(replace(model, vision=alone)) == 576


@pytest.mark.parametrize(
    ("name", "tokens", "side", "towers"),
    [
        ("deepseek_vl_tiny", 36, 256, 2),
        ("deepseek_vl_1b", 576, 384, 1),
        ("deepseek_vl_7b", 576, 1024, 2),
    ],
)
def test_the_configs_that_ship_are_valid(name: str, tokens: int, side: int, towers: int) -> None:
    model = read(name)
    check_model(model)
    assert model.name == name
    assert tokens_per_image(model) == tokens
    assert image_size(model) == side
    assert sum(tower is not None for tower in (model.vision.siglip, model.vision.sam)) == towers


def test_the_full_size_configs_are_the_released_models() -> None:
    small, large = read("deepseek_vl_1b"), read("deepseek_vl_7b")
    assert small.vision == VisionConfig(siglip=SiglipConfig())
    assert large.vision == VisionConfig(siglip=SiglipConfig(), sam=SamConfig(), adaptor=HYBRID)
    shared = {"vocab_size": 102400, "max_positions": 16384}
    assert small.language == LanguageConfig(
        hidden_size=2048, num_layers=24, num_heads=16, ffn_hidden_size=5632, **shared
    )
    assert large.language == LanguageConfig(
        hidden_size=4096, num_layers=30, num_heads=32, ffn_hidden_size=11008, **shared
    )


def test_the_largest_tower_gives_size_and_colour() -> None:
    assert largest_tower(make()) == SamConfig()
    assert largest_tower(make(sam=None, siglip={"image_size": 2048})).image_size == 2048


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make(siglip={"num_heads": 15}), r"siglip\.width=1024 .*siglip\.num_heads=15"),
        (make(sam={"num_heads": 7}), r"sam\.width=768 .*sam\.num_heads=7"),
        (make(siglip={"patch_size": 14}), r"siglip\.image_size=384 .*siglip\.patch_size=14"),
        (make(sam={"patch_size": 15}), r"sam\.image_size=1024 .*sam\.patch_size=15"),
        (make(siglip={"image_size": 320}), r"model\.vision\.sam gives 576, model\.vision\.siglip gives 400"),
        (make(sam={"global_layers": [2, 12]}), r"sam\.global_layers=\[2, 12\].*0\.\.11"),
        (make(sam={"global_layers": [-1]}), r"sam\.global_layers=\[-1\].*0\.\.11"),
        (make(sam={"hd_layer": 12}), r"sam\.hd_layer=12 .*0\.\.11"),
        (make(sam={"resized_grid": 98}), r"sam\.resized_grid=98 .*divisible by 4"),
        (make(sam={"window_size": 0}), r"sam\.window_size=0"),
        (make(sam={"downsample_widths": [512, 0]}), r"sam\.downsample_widths=\[512, 0\]"),
        (make(sam={"mean": [0.5]}), r"sam\.mean=\[0\.5\].*three"),
        (make(siglip={"std": [0.5, 0.5, 0.0]}), r"siglip\.std=.*above 0"),
        (make(siglip={"num_layers": 0}), r"siglip\.num_layers=0"),
        (make(adaptor=AdaptorConfig()), r"adaptor\.kind=mlp_gelu .*2 vision"),
        (make(adaptor=AdaptorConfig(kind="none")), r"adaptor\.kind=none .*mlp_gelu.*hybrid_mlp_gelu"),
        (make(adaptor=replace(HYBRID, depth=0)), r"adaptor\.depth=0"),
        (alone("shared_mlp_gelu"), r"adaptor\.kind=shared.* 1 vision"),
        (
            make(siglip={"image_size": 336}, sam={"resized_grid": 84}, adaptor=AdaptorConfig(kind=POOLING)),
            r"adaptor\.kind=pool_height_mlp_gelu .*21 x 21 tokens.*siglip\.image_size.*sam\.resized_grid",
        ),
        (make(max_images_per_forward=0), r"max_images_per_forward=0"),
        (make(language={"num_heads": 3}), r"language\.hidden_size=64 .*language\.num_heads=3"),
        (make(language={"num_heads": 64}), r"64 .*= 1 must be even"),
        (make(language={"vocab_size": 0}), r"language\.vocab_size=0"),
        (ModelConfig(language=LANGUAGE), r"model\.vision has no tower"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(model)
