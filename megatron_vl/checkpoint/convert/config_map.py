"""How transformers' config.json names the sizes of our configs: one table per part, read in both directions.

Fields of transformers 5.23's LlamaConfig, SiglipVisionConfig and SamVisionConfig -> those of `config.model`.
"""

from collections.abc import Mapping
from typing import Any

LANGUAGE = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
}
_TOWER = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_epsilon",
}
SIGLIP = {**_TOWER, "intermediate_size": "ffn_hidden_size"}
SAM = {
    **_TOWER,
    "window_size": "window_size",
    "global_attn_indexes": "global_layers",
    "output_channels": "neck_width",
}


def in_their_names(fields: Mapping[str, str], config: Any) -> dict[str, Any]:
    """The values of one of our configs."""
    return {theirs: getattr(config, ours) for theirs, ours in fields.items()}
