"""How other projects name and cut the tensors of our checkpoints: one table per part, read in both directions.

Names on the left are those of our checkpoints, without the part's prefix (`PREFIXES`); `{}` is a layer's number.
Sources: the module names of transformers 5.23 (deepseek_vl, deepseek_vl_hybrid, llama, siglip, sam), of the
official DeepSeek-VL code (siglip_vit.py, sam.py, clip_encoder.py, projector.py) and of segment-anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vl.config.model import ModelConfig


@dataclass(frozen=True)
class Join:
    """How several of their tensors are one of ours. Both directions only move values: they are bitwise inverses."""

    to_ours: Callable[[list[Tensor], ModelConfig], Tensor]
    to_theirs: Callable[[Tensor, ModelConfig], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One of our tensors and those of theirs that hold the same values."""

    ours: str
    theirs: tuple[str, ...]
    join: Join

    def without_values(
        self, shape: torch.Size, model: ModelConfig, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Their tensors by name, on the meta device, for one of ours of this shape and dtype."""
        ours = torch.empty(shape, dtype=dtype, device="meta")
        return dict(zip(self.theirs, self.join.to_theirs(ours, model), strict=True))


def _interleave(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v [H, ...] -> head by head q, k, v, as megatron-core's fused layer wants them."""
    heads = [part.unflatten(0, (model.language.num_heads, -1)) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)


def _deinterleave(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    heads = fused.unflatten(0, (model.language.num_heads, 3, -1))
    return [part.flatten(0, 1) for part in heads.unbind(1)]


SAME = Join(lambda parts, _: parts[0], lambda tensor, _: [tensor])
BATCHED = Join(lambda parts, _: parts[0].unsqueeze(0), lambda tensor, _: [tensor.squeeze(0)])
THIRDS = Join(lambda parts, _: torch.cat(parts), lambda tensor, _: list(tensor.chunk(3)))
HALVES = Join(lambda parts, _: torch.cat(parts), lambda tensor, _: list(tensor.chunk(2)))
HEADS = Join(_interleave, _deinterleave)


def _weight(ours: str, *theirs: str, join: Join = SAME) -> tuple[Rule, ...]:
    return (Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), join),)


def _both(ours: str, *theirs: str, join: Join = SAME) -> tuple[Rule, ...]:
    """Weight and bias."""
    return tuple(
        Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), join)
        for kind in ("weight", "bias")
    )


Table = tuple[Rule, ...]

LLAMA: Table = (
    *_weight("stage_zero.embedding", "embed_tokens"),
    # Norms are named as TransformerEngine's fused layers name them, whatever layers wrote the checkpoint.
    Rule(
        "language.block.layers.{}.self_attention.linear_qkv.layer_norm_weight",
        ("layers.{}.input_layernorm.weight",),
        SAME,
    ),
    *_weight(
        "language.block.layers.{}.self_attention.linear_qkv",
        *(f"layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
        join=HEADS,
    ),
    *_weight("language.block.layers.{}.self_attention.linear_proj", "layers.{}.self_attn.o_proj"),
    Rule(
        "language.block.layers.{}.mlp.linear_fc1.layer_norm_weight",
        ("layers.{}.post_attention_layernorm.weight",),
        SAME,
    ),
    *_weight(
        "language.block.layers.{}.mlp.linear_fc1",
        "layers.{}.mlp.gate_proj",
        "layers.{}.mlp.up_proj",
        join=HALVES,
    ),
    *_weight("language.block.layers.{}.mlp.linear_fc2", "layers.{}.mlp.down_proj"),
    *_weight("language.block.final_layernorm", "norm"),
)
HEAD: Table = _weight("language.head", "lm_head")

SIGLIP_TRANSFORMERS: Table = (
    Rule("pos_embed", ("embeddings.position_embedding.weight",), BATCHED),
    *_both("patch_embed", "embeddings.patch_embedding"),
    *_both("blocks.{}.norm1", "encoder.layers.{}.layer_norm1"),
    *_both(
        "blocks.{}.attn.qkv", *(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"), join=THIRDS
    ),
    *_both("blocks.{}.attn.proj", "encoder.layers.{}.self_attn.out_proj"),
    *_both("blocks.{}.norm2", "encoder.layers.{}.layer_norm2"),
    *_both("blocks.{}.mlp.fc1", "encoder.layers.{}.mlp.fc1"),
    *_both("blocks.{}.mlp.fc2", "encoder.layers.{}.mlp.fc2"),
    *_both("norm", "post_layernorm"),
)
SIGLIP_OFFICIAL: Table = (
    Rule("pos_embed", ("pos_embed",), SAME),
    *_both("patch_embed", "patch_embed.proj"),
    *(
        rule
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for rule in _both(f"blocks.{{}}.{layer}", f"blocks.{{}}.{layer}")
    ),
    *_both("norm", "norm"),
)


def _sam(patch_embed: str, block: str, norm: str, neck: tuple[str, ...]) -> Table:
    """SAM's trunk and neck; `neck` are the names of its two convolutions and norms, in order."""
    return (
        Rule("pos_embed", ("pos_embed",), SAME),
        *_both("patch_embed", patch_embed),
        *_both("blocks.{}.norm1", f"{block}.{norm}1"),
        *_both("blocks.{}.attn.qkv", f"{block}.attn.qkv"),
        *_both("blocks.{}.attn.proj", f"{block}.attn.proj"),
        Rule("blocks.{}.attn.rel_pos_h", (f"{block}.attn.rel_pos_h",), SAME),
        Rule("blocks.{}.attn.rel_pos_w", (f"{block}.attn.rel_pos_w",), SAME),
        *_both("blocks.{}.norm2", f"{block}.{norm}2"),
        *_both("blocks.{}.mlp.fc1", f"{block}.mlp.lin1"),
        *_both("blocks.{}.mlp.fc2", f"{block}.mlp.lin2"),
        *_neck("neck", neck),
    )


def _neck(ours: str, theirs: tuple[str, ...]) -> Table:
    return (
        *_weight(f"{ours}.0", theirs[0]),
        *_both(f"{ours}.1", theirs[1]),
        *_weight(f"{ours}.2", theirs[2]),
        *_both(f"{ours}.3", theirs[3]),
    )


NECK_TRANSFORMERS = ("conv1", "layer_norm1", "conv2", "layer_norm2")
SAM_TRANSFORMERS: Table = _sam(
    "patch_embed.projection", "layers.{}", "layer_norm", tuple(f"neck.{name}" for name in NECK_TRANSFORMERS)
)
SAM_OFFICIAL: Table = _sam("patch_embed.proj", "blocks.{}", "norm", tuple(f"neck.{i}" for i in range(4)))

DOWNSAMPLE_TRANSFORMERS: Table = (
    *_neck("neck_hd", tuple(f"high_res_vision_neck.{name}" for name in NECK_TRANSFORMERS)),
    *_weight("downsamples.0", "high_res_vision_proj.conv1"),
    *_weight("downsamples.1", "high_res_vision_proj.conv2"),
    Rule("hd_alpha", ("high_res_vision_alpha",), SAME),
)
DOWNSAMPLE_OFFICIAL: Table = (
    *_neck("neck_hd", tuple(f"neck_hd.{i}" for i in range(4))),
    *_weight("downsamples.0", "downsamples.0"),
    *_weight("downsamples.1", "downsamples.1"),
    Rule("hd_alpha", ("hd_alpha_downsamples",), SAME),
)

MLP_TRANSFORMERS: Table = (*_both("layers.0", "linear1"), *_both("layers.2", "linear2"))
MLP_OFFICIAL: Table = (*_both("layers.0", "layers.0"), *_both("layers.2", "layers.2"))
HYBRID_TRANSFORMERS: Table = (
    *_both("high_up_proj", "high_res_vision_proj"),
    *_both("low_up_proj", "vision_proj"),
    *_both("layers.1", "proj"),
)
HYBRID_OFFICIAL: Table = (
    *_both("high_up_proj", "high_up_proj"),
    *_both("low_up_proj", "low_up_proj"),
    *_both("layers.1", "layers.1"),
)

# A part of the model -> where our checkpoints keep it
PREFIXES = {
    "language": "",
    "head": "",
    "siglip": "stage_zero.towers.siglip.",
    "sam": "stage_zero.towers.sam.",
    "downsample": "stage_zero.towers.sam.",
    "mlp_gelu": "stage_zero.adaptor.",
    "hybrid_mlp_gelu": "stage_zero.adaptor.",
}


def rules_of(part: str, table: Table, their_prefix: str, num_layers: int) -> list[Rule]:
    """The rules of one part with whole names on both sides, for every layer."""

    def named(rule: Rule, number: str) -> Rule:
        ours = PREFIXES[part] + rule.ours.format(number)
        return replace(
            rule, ours=ours, theirs=tuple(their_prefix + name.format(number) for name in rule.theirs)
        )

    return [
        named(rule, str(number))
        for rule in table
        for number in (range(num_layers) if "{}" in rule.ours else (0,))
    ]
