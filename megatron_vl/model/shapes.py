"""The shape of every parameter of a model, by its name in our checkpoints, without building one rank's part."""

import torch
from torch import nn

from megatron_vl.config.model import LanguageConfig, ModelConfig
from megatron_vl.model.adaptor import build_adaptor
from megatron_vl.model.encoders import build_towers


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Name in a checkpoint -> shape of the whole parameter. No memory is taken for values."""
    vision = vision_without_values(model)
    shapes = {f"stage_zero.{name}": parameter.shape for name, parameter in vision.named_parameters()}
    return shapes | _language_shapes(model.language)


def vision_without_values(model: ModelConfig) -> nn.ModuleDict:
    """Towers and adaptor as stage zero holds them, on the meta device."""
    with torch.device("meta"):
        towers = build_towers(model.vision)
        adaptor = build_adaptor(model.vision.adaptor, towers.output_widths, model.language.hidden_size)
        return nn.ModuleDict({"towers": towers, "adaptor": adaptor})


def _language_shapes(language: LanguageConfig) -> dict[str, torch.Size]:
    """As megatron-core's fused layers have them; norms are entries of the linear layer that follows."""
    hidden, ffn, vocab = language.hidden_size, language.ffn_hidden_size, language.vocab_size
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "stage_zero.embedding.weight": (vocab, hidden),
        "language.block.final_layernorm.weight": (hidden,),
        "language.head.weight": (vocab, hidden),
    }
    for number in range(language.num_layers):
        shapes |= {f"language.block.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}
