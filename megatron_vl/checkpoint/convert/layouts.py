"""The layouts in which weights come: which part of the model lies where, and how a folder's layout is told."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_vl.checkpoint.convert import weight_map as tables
from megatron_vl.checkpoint.convert.weight_map import Rule, Table, rules_of
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`parts`: a part of the model -> the prefix of its names there, and its table. `marker` is a name that this
    layout has and no other; names that contain one of `unused` hold nothing that the model computes with."""

    name: str
    marker: str
    parts: Mapping[str, tuple[str, Table]]
    unused: tuple[str, ...] = ()

    def rules(self, model: ModelConfig) -> list[Rule]:
        """The rules of all parts that both the layout and the model have."""
        return [
            rule
            for part, num_layers in layers_of_parts(model).items()
            if part in self.parts
            for rule in rules_of(part, self.parts[part][1], self.parts[part][0], num_layers)
        ]


def layers_of_parts(model: ModelConfig) -> dict[str, int]:
    """The parts of a model, and over how many layers each repeats."""
    vision = model.vision
    parts = {"language": model.language.num_layers, "head": 1}
    if vision.siglip is not None:
        parts["siglip"] = vision.siglip.num_layers
    if vision.sam is not None:
        parts |= {"sam": vision.sam.num_layers, "downsample": 1}
    return parts | {vision.adaptor.kind: 1}


def _transformers(siglip_prefix: str) -> dict[str, tuple[str, Table]]:
    return {
        "language": ("model.language_model.", tables.LLAMA),
        "head": ("", tables.HEAD),
        "siglip": (siglip_prefix, tables.SIGLIP_TRANSFORMERS),
        "sam": ("model.high_res_vision_model.vision_encoder.", tables.SAM_TRANSFORMERS),
        "downsample": ("model.", tables.DOWNSAMPLE_TRANSFORMERS),
        "mlp_gelu": ("model.aligner.", tables.MLP_TRANSFORMERS),
        "hybrid_mlp_gelu": ("model.aligner.", tables.HYBRID_TRANSFORMERS),
    }


def _official(siglip_prefix: str) -> dict[str, tuple[str, Table]]:
    high = "vision_model.vision_tower_high.vision_tower."
    return {
        "language": ("language_model.model.", tables.LLAMA),
        "head": ("language_model.", tables.HEAD),
        "siglip": (siglip_prefix, tables.SIGLIP_OFFICIAL),
        "sam": (high, tables.SAM_OFFICIAL),
        "downsample": (high, tables.DOWNSAMPLE_OFFICIAL),
        "mlp_gelu": ("aligner.", tables.MLP_OFFICIAL),
        "hybrid_mlp_gelu": ("aligner.", tables.HYBRID_OFFICIAL),
    }


LLAMA_UNUSED = ("rotary_emb.inv_freq",)
TRANSFORMERS = Layout(
    name="transformers",
    marker="model.vision_model.post_layernorm.weight",
    parts=_transformers("model.vision_model."),
    unused=(*LLAMA_UNUSED, "position_ids", "vision_model.head."),
)
TRANSFORMERS_NESTED = Layout(
    name="transformers before 5",
    marker="model.vision_model.vision_model.post_layernorm.weight",
    parts=_transformers("model.vision_model.vision_model."),
    unused=TRANSFORMERS.unused,
)
OFFICIAL_UNUSED = (*LLAMA_UNUSED, "attn_pool.", "high_layer_norm.", "low_layer_norm.")
OFFICIAL = Layout(
    name="official DeepSeek-VL, SigLIP",
    marker="vision_model.vision_tower.norm.weight",
    parts=_official("vision_model.vision_tower."),
    unused=OFFICIAL_UNUSED,
)
OFFICIAL_HYBRID = Layout(
    name="official DeepSeek-VL, SigLIP and SAM",
    marker="vision_model.vision_tower_low.vision_tower.norm.weight",
    parts=_official("vision_model.vision_tower_low.vision_tower."),
    unused=OFFICIAL_UNUSED,
)
WHOLE_MODELS = (TRANSFORMERS, TRANSFORMERS_NESTED, OFFICIAL, OFFICIAL_HYBRID)

LANGUAGE_MODELS = (
    Layout(
        name="LLaMA",
        marker="model.norm.weight",
        parts={"language": ("model.", tables.LLAMA), "head": ("", tables.HEAD)},
        unused=LLAMA_UNUSED,
    ),
)
SIGLIP_MODELS = (
    Layout(
        name="SigLIP of transformers",
        marker="vision_model.post_layernorm.weight",
        parts={"siglip": ("vision_model.", tables.SIGLIP_TRANSFORMERS)},
        unused=("vision_model.head.", "text_model.", "logit_scale", "logit_bias", "position_ids"),
    ),
    Layout(
        name="SigLIP of timm",
        marker="norm.weight",
        parts={"siglip": ("", tables.SIGLIP_OFFICIAL)},
        unused=("attn_pool.",),
    ),
)
SAM_UNUSED = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "pixel_mean", "pixel_std")
SAM_MODELS = (
    Layout(
        name="SAM of transformers",
        marker="vision_encoder.neck.conv1.weight",
        parts={"sam": ("vision_encoder.", tables.SAM_TRANSFORMERS)},
        unused=SAM_UNUSED,
    ),
    Layout(
        name="segment-anything",
        marker="image_encoder.neck.0.weight",
        parts={"sam": ("image_encoder.", tables.SAM_OFFICIAL)},
        unused=SAM_UNUSED,
    ),
)


def layout_of(names: Collection[str], candidates: tuple[Layout, ...], folder: str) -> Layout:
    """The layout of weights with these names.

    Raises:
        UserError: it is none of `candidates`.
    """
    for layout in candidates:
        if layout.marker in names:
            return layout
    known = "; ".join(f"{layout.name} (has {layout.marker})" for layout in candidates)
    sample = ", ".join(sorted(names)[:3])
    raise UserError(f"{folder} holds weights in an unknown layout, such as {sample}; known: {known}")
