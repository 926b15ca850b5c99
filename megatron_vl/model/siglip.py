"""SigLIP: a plain vision transformer without class token (arXiv 2303.15343; DeepSeek-VL, section 3.1).

Shapes: N images, C channels, H W pixels, T tokens, A attention heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vl.config.model import SiglipConfig
from megatron_vl.config.model_check import siglip_tokens
from megatron_vl.model.vit import Mlp, VisionEncoder, run_block


class SiglipEncoder(VisionEncoder):
    """All blocks, then the final norm; no pooling head."""

    def __init__(self, config: SiglipConfig) -> None:
        num_tokens = siglip_tokens(config)
        super().__init__(config, num_tokens=num_tokens, output_width=config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.width))
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)

    def forward(self, image_NCHW: Tensor, recompute: bool = False) -> Tensor:
        """See VisionEncoder."""
        x_NTC = self.patch_embed(image_NCHW).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x_NTC = run_block(block, x_NTC, recompute)
        features_NTC: Tensor = self.norm(x_NTC)
        return features_NTC


class SiglipBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.mlp = Mlp(config.width, config.ffn_hidden_size)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Shape [N, T, C], kept."""
        x_NTC = x_NTC + self.attn(self.norm1(x_NTC))
        y_NTC: Tensor = x_NTC + self.mlp(self.norm2(x_NTC))
        return y_NTC


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of an image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Shape [N, T, C], kept."""
        qkv_NT3AD = self.qkv(x_NTC).unflatten(-1, (3, self.num_heads, -1))
        q_NATD, k_NATD, v_NATD = qkv_NT3AD.permute(2, 0, 3, 1, 4).unbind()
        y_NATD = F.scaled_dot_product_attention(q_NATD, k_NATD, v_NATD)
        y_NTC: Tensor = self.proj(y_NATD.transpose(1, 2).flatten(2))
        return y_NTC
