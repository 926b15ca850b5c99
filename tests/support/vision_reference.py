"""Transformers' DeepSeek-VL vision modules as the independent reference of ours: configs, names, comparison.

Shapes: N images, C channels, H W pixels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import DeepseekVLHybridConfig, DeepseekVLHybridModel, LlamaConfig
from transformers import SamVisionConfig as ReferenceSamConfig
from transformers import SiglipVisionConfig as ReferenceSiglipConfig

from megatron_vl.config.model import SamConfig, SiglipConfig

# Transformers' name (from DeepseekVLHybridModel) -> ours, applied in order.
RENAMES = (
    (r"^vision_model\.", "towers.siglip."),
    (r"^high_res_vision_model\.vision_encoder\.", "towers.sam."),
    (r"^high_res_vision_neck\.", "towers.sam.neck_hd."),
    (r"^high_res_vision_proj\.conv(\d)", lambda m: f"towers.sam.downsamples.{int(m[1]) - 1}"),
    (r"^high_res_vision_alpha$", "towers.sam.hd_alpha"),
    (r"^aligner\.vision_proj\.", "adaptor.low_up_proj."),
    (r"^aligner\.high_res_vision_proj\.", "adaptor.high_up_proj."),
    (r"^aligner\.proj\.", "adaptor.layers.1."),
    (r"(neck(?:_hd)?)\.conv(\d)", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}"),
    (r"(neck(?:_hd)?)\.layer_norm(\d)", lambda m: f"{m[1]}.{2 * int(m[2]) - 1}"),
    (r"embeddings\.patch_embedding", "patch_embed"),
    (r"patch_embed\.projection", "patch_embed"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"post_layernorm", "norm"),
    (r"(?:encoder\.)?layers\.(\d+)\.(self_attn|attn|mlp|layer_norm)", r"blocks.\1.\2"),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"mlp\.lin", "mlp.fc"),
)


def reference_model(siglip: SiglipConfig, sam: SamConfig, hidden_size: int) -> DeepseekVLHybridModel:
    """Transformers' hybrid model with our towers' sizes, explicit attention, and hardly a language model."""
    text = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        intermediate_size=1,
        vocab_size=8,
    )
    return DeepseekVLHybridModel(reference_config(siglip, sam, text)).eval()


def reference_config(siglip: SiglipConfig, sam: SamConfig, text: LlamaConfig) -> DeepseekVLHybridConfig:
    """Transformers' hybrid configuration with our towers' sizes and explicit attention."""
    low = ReferenceSiglipConfig(
        hidden_size=siglip.width,
        intermediate_size=siglip.ffn_hidden_size,
        num_hidden_layers=siglip.num_layers,
        num_attention_heads=siglip.num_heads,
        image_size=siglip.image_size,
        patch_size=siglip.patch_size,
        hidden_act="gelu",  # its default is the tanh approximation
        vision_use_head=False,
    )
    high = ReferenceSamConfig(
        hidden_size=sam.width,
        mlp_dim=sam.ffn_hidden_size,
        num_hidden_layers=sam.num_layers,
        num_attention_heads=sam.num_heads,
        image_size=sam.image_size,
        patch_size=sam.patch_size,
        window_size=sam.window_size,
        global_attn_indexes=sam.global_layers,
        output_channels=sam.neck_width,
    )
    return DeepseekVLHybridConfig(
        text_config=text,
        vision_config=low,
        high_res_vision_config=high,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Values at which every parameter shows: norms and biases vary, positions and HD alpha are not near 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if re.search(r"norm\d?\.weight$", name):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() < 2 or "pos" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def in_our_names(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' name -> by ours, q, k and v joined, without the language model's."""
    ours: dict[str, Tensor] = {}
    for name, tensor in reference.items():
        if name.startswith("language_model."):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name == "towers.siglip.pos_embed":
            tensor = tensor.unsqueeze(0)
        ours[name] = tensor
    for name in [name for name in ours if ".self_attn.q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        ours[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return ours


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name, of every parameter that got one."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def largest_error(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> float:
    """Over tensors of the same names, the largest norm of the difference relative to the reference's norm."""
    assert values.keys() == references.keys()
    pairs = [(values[name].double(), reference.double()) for name, reference in references.items()]
    return max(float((value - reference).norm() / reference.norm()) for value, reference in pairs)
