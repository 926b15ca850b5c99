"""From the towers' features to the decoder's width (DeepSeek-VL, section 3.1 and Table 10).

Shapes: N images, T image tokens, C a tower's width, E the decoder's hidden size.
"""

from collections.abc import Callable, Sequence

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


# `model.vision.adaptor.kind` -> built from the towers' widths, the decoder's width, the depth
ADAPTORS: dict[str, Callable[[Sequence[int], int, int], nn.Module]] = {
    "mlp_gelu": MlpGelu,
    "hybrid_mlp_gelu": HybridMlpGelu,
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
