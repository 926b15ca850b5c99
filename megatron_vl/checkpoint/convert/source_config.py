"""A model's shape from the config.json that comes with its weights.

What such a file leaves out has the default of the class that reads it: those of transformers' LlamaConfig,
SiglipVisionConfig and SamVisionConfig, which the official DeepSeek-VL code uses for its language model too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.convert import config_map
from megatron_vl.checkpoint.convert.weight_files import read_json
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import (
    AdaptorConfig,
    LanguageConfig,
    ModelConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)
from megatron_vl.config.model_check import check_model

CONFIG_FILE = "config.json"
IMAGE_TOKEN_ID = 100015  # of <image_placeholder> in the released tokenizers
# Shapes are laid out before any weight is looked at. Beyond these limits that alone fills a machine or overflows.
LIMITS = {"num_hidden_layers": 1000, "image_size": 2**16}
MAX_NUMBER = 10**9
MAX_SIZE = 2**24

LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
SIGLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
}
SAM_DEFAULTS = {
    "image_size": 1024,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_dim": 3072,  # as a type: without it the class takes `mlp_ratio`
    "mlp_ratio": 4.0,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
    "output_channels": 256,
    "layer_norm_eps": 1e-6,
}
# A field of the language model's config -> the one value that this framework's decoder computes
LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
# Of a SigLIP of its own: its class's default, and the exact form, which is computed for both
SIGLIP_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
# The towers that official configs name, with the sizes in the code of those names
OFFICIAL_SIGLIP = {"siglip_large_patch16_384": SiglipConfig()}
OFFICIAL_SAM = {"sam_b_downsample": SamConfig()}
OFFICIAL_ADAPTORS = {"mlp_gelu": "mlp_gelu", "low_high_hybrid_split_mlp_gelu": "hybrid_mlp_gelu"}


@dataclass(frozen=True)
class SourceModel:
    """A shape, and the id that stands for an image."""

    model: ModelConfig
    image_token_id: int


class _Section:
    """A table of a config.json with the defaults of its class; errors name file and field."""

    def __init__(self, values: Any, defaults: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where} must be an object; it is {values!r}")
        self.values, self.defaults, self.where = values, defaults, where

    def __getitem__(self, name: str) -> Any:
        value = self.values.get(name, self.defaults.get(name))
        kind = type(self.defaults[name])
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{self.where}.{name} is {value!r}; it must be of type {kind.__name__}")
        limit = MAX_NUMBER if kind is float else LIMITS.get(name, MAX_SIZE)
        if kind is not list and not 0 < value <= limit:  # NaN is neither
            raise UserError(f"{self.where}.{name} is {value}; it must be above 0 and at most {limit}")
        return value

    def in_our_names(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """The values of a table of `config_map`, as arguments of our config."""
        return {ours: self[theirs] for theirs, ours in fields.items()}

    def require(self, name: str, valid: tuple[Any, ...]) -> None:
        """Refuse what would be computed otherwise. A field that is not there has a valid default."""
        if self.values.get(name, valid[0]) not in valid:
            raise UserError(
                f"{self.where}.{name} is {self.values[name]!r}; "
                f"this framework computes {' or '.join(map(repr, valid))} only"
            )


def read_source_model(folder: Path) -> SourceModel:
    """The model that a folder in a layout of WHOLE_MODELS holds.

    Raises:
        UserError: config.json is missing or broken, or describes an architecture that this framework has not.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    readers = {
        "deepseek_vl": _transformers_model,
        "deepseek_vl_hybrid": _transformers_model,
        "multi_modality": _official_model,
    }
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(
            f"{path}: model_type is {kind!r}, an unknown architecture; known: {', '.join(readers)}"
        )
    model = readers[kind](values, path)
    check_model(model)
    image_token_id = values.get("image_token_id", IMAGE_TOKEN_ID)
    if type(image_token_id) is not int or image_token_id < 0:
        raise UserError(f"{path}: image_token_id is {image_token_id!r}; it must be a token's id")
    return SourceModel(model, image_token_id)


def read_parts(folders: Mapping[str, Path], adaptor: str | None) -> ModelConfig:
    """The model that a language model and vision towers make together; `folders` by language, siglip, sam.

    A source that is a single file has no config.json: it is one of the released SigLIP-L/16-384 and SAM-B.
    `adaptor` is a kind of `model.vision.adaptor`; None takes the paper's for this number of towers.
    """
    siglip = sam = None
    if "siglip" in folders:
        section, where = _tower(folders["siglip"])
        siglip = SiglipConfig() if section is None else _siglip(section, where, SIGLIP_ACTIVATIONS)
    if "sam" in folders:
        section, where = _tower(folders["sam"])
        grid = SamConfig().resized_grid if siglip is None else 4 * (siglip.image_size // siglip.patch_size)
        sam = SamConfig(resized_grid=grid) if section is None else _sam(section, where, grid)
    path = folders["language"] / CONFIG_FILE
    kind = adaptor or ("hybrid_mlp_gelu" if siglip and sam else "mlp_gelu")
    model = ModelConfig(
        name="deepseek_vl_hybrid" if sam else "deepseek_vl",
        language=_language(read_json(path), str(path)),
        vision=VisionConfig(siglip=siglip, sam=sam, adaptor=AdaptorConfig(kind=kind)),
    )
    check_model(model)
    return model


def _tower(source: Path) -> tuple[dict[str, Any] | None, str]:
    if source.is_file():
        return None, str(source)
    path = source / CONFIG_FILE
    values = read_json(path)
    return values.get("vision_config", values), str(path)


def _transformers_model(values: dict[str, Any], path: Path) -> ModelConfig:
    language = _language(values.get("text_config"), f"{path}: text_config")
    siglip = _siglip(values.get("vision_config"), f"{path}: vision_config", ("gelu",))
    if values["vision_config"].get("hidden_act") != "gelu":
        raise UserError(
            f"{path}: vision_config.hidden_act must be 'gelu': the default of its class is an approximation"
        )
    hybrid = values["model_type"] == "deepseek_vl_hybrid"
    sam = None
    if hybrid:
        grid = 4 * (siglip.image_size // siglip.patch_size)
        sam = _sam(values.get("high_res_vision_config", {}), f"{path}: high_res_vision_config", grid)
    adaptor = AdaptorConfig(kind="hybrid_mlp_gelu" if hybrid else "mlp_gelu")
    return ModelConfig(
        name=values["model_type"],
        language=language,
        vision=VisionConfig(siglip=siglip, sam=sam, adaptor=adaptor),
    )


def _official_model(values: dict[str, Any], path: Path) -> ModelConfig:
    vision = _table(_table(values, "vision_config", path), "params", path)
    aligner = _table(_table(values, "aligner_config", path), "params", path)
    hybrid = "high_res_cfg" in vision
    low = _table(vision, "low_res_cfg", path) if hybrid else vision
    siglip = _named(low.get("model_name"), OFFICIAL_SIGLIP, f"{path}: vision_config: the SigLIP's model_name")
    sam = None
    if hybrid:
        name = _table(vision, "high_res_cfg", path).get("model_name")
        sam = _named(name, OFFICIAL_SAM, f"{path}: vision_config: high_res_cfg.model_name")
    kind = _named(
        aligner.get("projector_type"), OFFICIAL_ADAPTORS, f"{path}: aligner_config: params.projector_type"
    )
    if aligner.get("depth", 2) != 2:
        raise UserError(f"{path}: aligner_config: params.depth is {aligner['depth']}; it must be 2")
    return ModelConfig(
        name="deepseek_vl_hybrid" if sam else "deepseek_vl",
        language=_language(values.get("language_config"), f"{path}: language_config"),
        vision=VisionConfig(siglip=siglip, sam=sam, adaptor=AdaptorConfig(kind=kind, depth=2)),
    )


def _table(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = values.get(name)
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} must be an object; it is {table!r}")
    return table


def _named(name: Any, known: Mapping[str, Any], where: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where} is {name!r}, an unknown architecture; known: {', '.join(known)}")
    return known[name]


def _language(values: Any, where: str) -> LanguageConfig:
    section = _Section(values, LLAMA_DEFAULTS, where)
    section.require("model_type", ("llama",))
    for name, value in LLAMA_FIXED.items():
        section.require(name, (value,))
    section.require("num_key_value_heads", (section["num_attention_heads"], None))
    section.require("head_dim", (section["hidden_size"] // section["num_attention_heads"], None))
    rope = _Section(values.get("rope_parameters") or {}, LLAMA_DEFAULTS, f"{where}.rope_parameters")
    rope.require("rope_type", ("default",))
    rope_theta = float(rope["rope_theta"] if "rope_theta" in rope.values else section["rope_theta"])
    return LanguageConfig(**section.in_our_names(config_map.LANGUAGE), rope_theta=rope_theta)


def _siglip(values: Any, where: str, activations: tuple[str, ...]) -> SiglipConfig:
    section = _Section(values, SIGLIP_DEFAULTS, where)
    section.require("model_type", ("siglip_vision_model",))
    section.require("hidden_act", activations)
    return SiglipConfig(**section.in_our_names(config_map.SIGLIP))


def _sam(values: Any, where: str, resized_grid: int) -> SamConfig:
    section = _Section(values, SAM_DEFAULTS, where)
    section.require("hidden_act", ("gelu",))
    section.require("use_rel_pos", (True,))
    fields = section.in_our_names(config_map.SAM)
    if not fields["global_layers"]:
        raise UserError(f"{where}.global_attn_indexes is empty; the HD branch starts at its first layer")
    if section.values.get("mlp_dim") is not None:
        ffn = section["mlp_dim"]
    else:
        ffn = int(fields["width"] * section["mlp_ratio"])
    return SamConfig(
        **fields,
        ffn_hidden_size=ffn,
        resized_grid=resized_grid,
        downsample_widths=[2 * fields["neck_width"], 4 * fields["neck_width"]],
        hd_layer=fields["global_layers"][0],
    )
