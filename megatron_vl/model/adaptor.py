"""From the towers' features to the decoder's width (DeepSeek-VL, section 3.1 and Table 10).

Two towers are joined along the embedding (hybrid, shared, separate) or along the sequence (pool); either way an
image takes as many tokens as one tower gives. Features come in tower order: high resolution, then low.

Shapes: N images, T image tokens (a square grid, row by row), C a tower's width, E the decoder's hidden size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_vl.config.model import AdaptorConfig
from megatron_vl.config.model_check import check_adaptor


class MlpGelu(nn.Module):
    """One tower: `depth` linear layers with exact GELU between them."""

    def __init__(self, tower_widths: Sequence[int], hidden_size: int, depth: int) -> None:
        super().__init__()
        (width,) = tower_widths
        self.layers = nn.Sequential(nn.Linear(width, hidden_size), *_gelu_linear(hidden_size, depth - 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One tower's features [N, T, C] -> [N, T, E]."""
        (features_NTC,) = features
        adapted_NTE: Tensor = self.layers(features_NTC)
        return adapted_NTE


class HybridMlpGelu(nn.Module):
    """Two towers: each projected to half the decoder's width, joined, then `depth - 1` x (GELU, Linear)."""

    def __init__(self, tower_widths: Sequence[int], hidden_size: int, depth: int) -> None:
        super().__init__()
        high_width, low_width = tower_widths
        self.high_up_proj = nn.Linear(high_width, hidden_size // 2)
        self.low_up_proj = nn.Linear(low_width, hidden_size // 2)
        self.layers = nn.Sequential(*_gelu_linear(hidden_size, depth - 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [N, T, C] of the high- and the low-resolution tower -> [N, T, E]."""
        high_NTC, low_NTC = features
        joined_NTE = torch.cat([self.high_up_proj(high_NTC), self.low_up_proj(low_NTC)], dim=-1)
        adapted_NTE: Tensor = self.layers(joined_NTE)
        return adapted_NTE


class SharedMlpGelu(nn.Module):
    """Two towers joined along the embedding, then one MLP for both: `depth` linear layers with GELU between.

    Table 10, "Shared MLP". The first layer already mixes the towers; the official code's `concat_type:
    feature` before `mlp_gelu` is the same.
    """

    def __init__(self, tower_widths: Sequence[int], hidden_size: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sum(tower_widths), hidden_size), *_gelu_linear(hidden_size, depth - 1)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [N, T, C] of the high- and the low-resolution tower -> [N, T, E]."""
        adapted_NTE: Tensor = self.layers(torch.cat(list(features), dim=-1))
        return adapted_NTE


class SeparateMlpGelu(nn.Module):
    """Two towers, each with an MLP of its own to half the decoder's width, then joined along the embedding.

    Table 10, "Separate MLP": nothing in the adaptor mixes the towers.
    """

    def __init__(self, tower_widths: Sequence[int], hidden_size: int, depth: int) -> None:
        super().__init__()
        high_width, low_width = tower_widths
        half = hidden_size // 2
        self.high_layers = nn.Sequential(nn.Linear(high_width, half), *_gelu_linear(half, depth - 1))
        self.low_layers = nn.Sequential(nn.Linear(low_width, half), *_gelu_linear(half, depth - 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [N, T, C] of the high- and the low-resolution tower -> [N, T, E]."""
        high_NTC, low_NTC = features
        return torch.cat([self.high_layers(high_NTC), self.low_layers(low_NTC)], dim=-1)


class PoolingMlpGelu(nn.Module):
    """Two towers joined along the sequence, each with half of its tokens (Table 10, "Token Pooling").

    `pool` joins two neighbouring tokens into one by stacking their channels, as the paper describes it
    ("stacking visual features along the image's width or height dimensions before sequence concatenation").
    The hybrid MLP becomes, for a sequence: a linear layer of its own for each tower, here to the decoder's
    full width since no channel is shared; then the high-resolution tokens before the low-resolution ones;
    then `depth - 1` x (GELU, Linear) for all of them.
    """

    def __init__(
        self,
        pool: Callable[[Tensor], Tensor],
        tower_widths: Sequence[int],
        hidden_size: int,
        depth: int,
    ) -> None:
        super().__init__()
        high_width, low_width = tower_widths
        self.pool = pool
        self.high_up_proj = nn.Linear(2 * high_width, hidden_size)
        self.low_up_proj = nn.Linear(2 * low_width, hidden_size)
        self.layers = nn.Sequential(*_gelu_linear(hidden_size, depth - 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [N, T, C] of the high- and the low-resolution tower -> [N, T, E]; T/2 tokens of each."""
        high_NTC, low_NTC = map(self.pool, features)
        joined_NTE = torch.cat([self.high_up_proj(high_NTC), self.low_up_proj(low_NTC)], dim=1)
        adapted_NTE: Tensor = self.layers(joined_NTE)
        return adapted_NTE


def pool_width(features_NTC: Tensor) -> Tensor:
    """[N, T, C] -> [N, T/2, 2C]: a token and its right neighbour; the grid's side is even."""
    num_images, num_tokens, width = features_NTC.shape
    return features_NTC.reshape(num_images, num_tokens // 2, 2 * width)


def pool_height(features_NTC: Tensor) -> Tensor:
    """[N, T, C] -> [N, T/2, 2C]: a token and the one below it; the grid's side is even."""
    num_images, num_tokens, width = features_NTC.shape
    side = math.isqrt(num_tokens)
    pairs = features_NTC.reshape(num_images, side // 2, 2, side, width).transpose(2, 3)
    return pairs.reshape(num_images, num_tokens // 2, 2 * width)


# `model.vision.adaptor.kind` -> built from the towers' widths, the decoder's width, the depth
ADAPTORS: dict[str, Callable[[Sequence[int], int, int], nn.Module]] = {
    "mlp_gelu": MlpGelu,
    "hybrid_mlp_gelu": HybridMlpGelu,
    "shared_mlp_gelu": SharedMlpGelu,
    "separate_mlp_gelu": SeparateMlpGelu,
    "pool_width_mlp_gelu": partial(PoolingMlpGelu, pool_width),
    "pool_height_mlp_gelu": partial(PoolingMlpGelu, pool_height),
}


def build_adaptor(adaptor: AdaptorConfig, tower_widths: Sequence[int], hidden_size: int) -> nn.Module:
    """The configured adaptor; its forward takes the towers' features in tower order (high, then low).

    Raises:
        UserError: no such kind, or it does not take this number of towers.
    """
    check_adaptor(adaptor, len(tower_widths))
    return ADAPTORS[adaptor.kind](tower_widths, hidden_size, adaptor.depth)


def _gelu_linear(hidden_size: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return layers
