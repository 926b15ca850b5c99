"""What must hold between the numbers of a model, and the facts that follow from them. No torch here."""

import math
from typing import Any

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import (
    AdaptorConfig,
    LanguageConfig,
    ModelConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)

ADAPTOR_TOWERS = {  # kind -> number of towers that it takes
    "mlp_gelu": 1,
    "hybrid_mlp_gelu": 2,
    "shared_mlp_gelu": 2,
    "separate_mlp_gelu": 2,
    "pool_width_mlp_gelu": 2,
    "pool_height_mlp_gelu": 2,
}
POOLING_ADAPTORS = ("pool_width_mlp_gelu", "pool_height_mlp_gelu")  # they halve a side of the grid

POSITIVE_LANGUAGE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "ffn_hidden_size",
    "vocab_size",
    "max_positions",
    "rope_theta",
    "norm_epsilon",
    "init_std",
)
POSITIVE_TOWER = (
    "image_size",
    "patch_size",
    "width",
    "num_layers",
    "num_heads",
    "ffn_hidden_size",
    "norm_epsilon",
)


def check_model(model: ModelConfig) -> None:
    """Raise UserError, naming the field, unless a model of this shape can be built."""
    _check_language(model.language)
    vision = model.vision
    for name, tower in towers(vision).items():
        _check_tower(tower, f"model.vision.{name}")
    if vision.sam is not None:
        _check_sam(vision.sam)
    _require_positive(vision, ("max_images_per_forward",), "model.vision")
    check_adaptor(vision.adaptor, len(towers(vision)))
    side = math.isqrt(tokens_per_image(model))
    if vision.adaptor.kind in POOLING_ADAPTORS and side % 2:
        raise UserError(
            f"model.vision.adaptor.kind={vision.adaptor.kind} joins neighbouring tokens in pairs, but the "
            f"towers give {side} x {side} tokens; the side must be even: change model.vision.siglip.image_size "
            "and model.vision.sam.resized_grid, or the kind"
        )


def check_adaptor(adaptor: AdaptorConfig, num_towers: int) -> None:
    """Raise UserError unless there is such an adaptor and it takes this number of towers."""
    kinds = ", ".join(f"{kind} (towers: {number})" for kind, number in ADAPTOR_TOWERS.items())
    if ADAPTOR_TOWERS.get(adaptor.kind) != num_towers:
        raise UserError(
            f"model.vision.adaptor.kind={adaptor.kind} does not fit this model's {num_towers} vision towers; "
            f"valid: {kinds}"
        )
    _require_positive(adaptor, ("depth",), "model.vision.adaptor")


def towers(vision: VisionConfig) -> dict[str, SiglipConfig | SamConfig]:
    """The towers present, by field, high resolution first. Raises UserError where there are none."""
    fields: dict[str, SiglipConfig | SamConfig | None] = {"sam": vision.sam, "siglip": vision.siglip}
    present = {name: tower for name, tower in fields.items() if tower is not None}
    if not present:
        raise UserError("model.vision has no tower; give model.vision.siglip, model.vision.sam or both")
    return present


def largest_tower(model: ModelConfig) -> SiglipConfig | SamConfig:
    """The tower whose `image_size` the images are stored at, and whose `mean` is their padding's colour."""
    return max(towers(model.vision).values(), key=lambda tower: tower.image_size)


def image_size(model: ModelConfig) -> int:
    """Side, in pixels, of the square images that the model takes."""
    return largest_tower(model).image_size


def tokens_per_image(model: ModelConfig) -> int:
    """Positions that one image takes in a row. Raises UserError where the towers disagree."""
    numbers = {
        f"model.vision.{name}": sam_tokens(tower) if isinstance(tower, SamConfig) else siglip_tokens(tower)
        for name, tower in towers(model.vision).items()
    }
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{name} gives {number}" for name, number in numbers.items())
        raise UserError(
            f"the vision towers must give the same number of tokens per image, but {listed}; siglip gives "
            "(image_size / patch_size)^2, sam (resized_grid / 2^len(downsample_widths))^2"
        )
    return next(iter(numbers.values()))


def siglip_tokens(siglip: SiglipConfig) -> int:
    """One token per patch."""
    return int((siglip.image_size // siglip.patch_size) ** 2)


def sam_tokens(sam: SamConfig) -> int:
    """One token per cell of the resized grid, after each downsampling has halved its sides."""
    return int((sam.resized_grid // 2 ** len(sam.downsample_widths)) ** 2)


def _check_language(language: LanguageConfig) -> None:
    _require_positive(language, POSITIVE_LANGUAGE, "model.language")
    _require_divisible(language, "hidden_size", "num_heads", "model.language")
    if language.hidden_size // language.num_heads % 2:
        raise UserError(
            f"model.language.hidden_size={language.hidden_size} / model.language.num_heads="
            f"{language.num_heads} = {language.hidden_size // language.num_heads} must be even: "
            "rotary positions turn the channels of a head in pairs"
        )


def _check_tower(tower: SiglipConfig | SamConfig, path: str) -> None:
    _require_positive(tower, POSITIVE_TOWER, path)
    _require_divisible(tower, "width", "num_heads", path)
    _require_divisible(tower, "image_size", "patch_size", path)
    for field, values in (("mean", tower.mean), ("std", tower.std)):
        if len(values) != 3 or (field == "std" and min(values) <= 0):
            raise UserError(f"{path}.{field}={values}: three numbers are needed, one per colour; std above 0")


def _check_sam(sam: SamConfig) -> None:
    path = "model.vision.sam"
    _require_positive(sam, ("window_size", "neck_width", "resized_grid"), path)
    in_range = range(sam.num_layers)
    if any(layer not in in_range for layer in sam.global_layers):
        raise UserError(
            f"{path}.global_layers={sam.global_layers}: each must be in 0..{sam.num_layers - 1} "
            f"({path}.num_layers={sam.num_layers})"
        )
    if sam.hd_layer is not None and sam.hd_layer not in in_range:
        raise UserError(
            f"{path}.hd_layer={sam.hd_layer} must be null or in 0..{sam.num_layers - 1} "
            f"({path}.num_layers={sam.num_layers})"
        )
    if any(width <= 0 for width in sam.downsample_widths):
        raise UserError(f"{path}.downsample_widths={sam.downsample_widths}: each must be above 0")
    factor = 2 ** len(sam.downsample_widths)
    if sam.resized_grid % factor:
        raise UserError(
            f"{path}.resized_grid={sam.resized_grid} must be divisible by {factor}: each of the "
            f"{len(sam.downsample_widths)} {path}.downsample_widths halves it"
        )


def _require_positive(config: Any, fields: tuple[str, ...], path: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value <= 0:
            raise UserError(f"{path}.{field}={value} must be above 0")


def _require_divisible(config: Any, field: str, by: str, path: str) -> None:
    value, divisor = getattr(config, field), getattr(config, by)
    if value % divisor:
        raise UserError(f"{path}.{field}={value} must be divisible by {path}.{by}={divisor}")
