"""FLOPs as torch counts them, fused attention on CPU included, and small odd models to count them of.

torch's counter knows no formula for CPU's fused attention: it gets those that torch has for CUDA's, which count every
pair of tokens, those behind the causal mask too. So where counts are compared, a row of one segment of s tokens has
s^2 pairs, not s^2 / 2; a packed row has those of its segments. Backward they count the scores anew, as kernels do.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_vl.config.model import (
    AdaptorConfig,
    LanguageConfig,
    ModelConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)

aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """The FLOPs that torch counts while `run` runs, and what it returns."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:  # type: ignore[arg-type]
        result = run()
    return counter.get_total_flops(), result


def small_model(adaptor: str = "hybrid_mlp_gelu", towers: tuple[str, ...] = ("sam", "siglip")) -> ModelConfig:
    """Odd sizes. SAM's grid of 13 x 13 in windows of 10 is padded to 20 x 20; no grid is so small that attention
    with gradients would take another form than the folded one, as on CUDA."""
    siglip = SiglipConfig(
        image_size=96, patch_size=16, width=40, num_layers=3, num_heads=5, ffn_hidden_size=104
    )
    sam = SamConfig(
        image_size=208,
        patch_size=16,
        width=48,
        num_layers=4,
        num_heads=3,
        ffn_hidden_size=112,
        window_size=10,
        global_layers=[1],
        neck_width=24,
        resized_grid=24,
        downsample_widths=[28, 36],
        hd_layer=1,
    )
    present = {name: tower for name, tower in (("sam", sam), ("siglip", siglip)) if name in towers}
    language = LanguageConfig(
        hidden_size=64, num_layers=3, num_heads=4, ffn_hidden_size=172, vocab_size=296, max_positions=512
    )
    vision = VisionConfig(adaptor=AdaptorConfig(kind=adaptor, depth=3), max_images_per_forward=2)
    return ModelConfig(name="small", language=language, vision=replace(vision, **present))  # type: ignore[arg-type]
