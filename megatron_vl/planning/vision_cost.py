"""What the vision towers and the adaptor cost per image: forward, input gradient, weight gradient.

Shapes of the modules in `megatron_vl.model` ({siglip,sam,adaptor}.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megatron_vl.config.model import ModelConfig, SamConfig, SiglipConfig
from megatron_vl.config.model_check import POOLING_ADAPTORS, siglip_tokens, tokens_per_image
from megatron_vl.planning.parameters import COLOURS, tower_widths
from megatron_vl.planning.work import UnitWork, Work, activation, attention, linear, moved, norm, residual

FP32_BYTES = 4
FUSED_MULTIPLE = 8  # fused attention wants head sizes that are a multiple of it


@dataclass(frozen=True, kw_only=True)
class VisionCost:
    """`folded_positions`: see planning.cost.CostModel."""

    model: ModelConfig
    element_bytes: int
    folded_positions: bool

    @property
    def siglip(self) -> SiglipConfig:
        if self.model.vision.siglip is None:
            raise ValueError("this model has no SigLIP tower")
        return self.model.vision.siglip

    @property
    def sam(self) -> SamConfig:
        if self.model.vision.sam is None:
            raise ValueError("this model has no SAM tower")
        return self.model.vision.sam


def siglip_patch(costs: VisionCost, images: float) -> UnitWork:
    """Patch embedding and positions; the tower's final norm is counted here too."""
    return _patch(costs, costs.siglip, images) + norm(
        images * siglip_tokens(costs.siglip) * costs.siglip.width * costs.element_bytes
    )


def sam_patch(costs: VisionCost, images: float) -> UnitWork:
    return _patch(costs, costs.sam, images)


def siglip_block(costs: VisionCost, images: float) -> UnitWork:
    tower, tokens = costs.siglip, siglip_tokens(costs.siglip)
    return (
        _projections(costs, tower.width, images * tokens)
        + attention(images * tokens**2, tower.width, tower.width)
        + _outside_attention(costs, tower, images * tokens)
    )


def sam_window_block(costs: VisionCost, images: float) -> UnitWork:
    """Zeros fill the windows that reach past the grid, and take part in everything up to attention's output."""
    tower = costs.sam
    grid = tower.image_size // tower.patch_size
    windows = math.ceil(grid / tower.window_size) ** 2
    padded_bytes = images * windows * tower.window_size**2 * tower.width * costs.element_bytes
    return (
        _grid_attention(costs, tower.window_size, images * windows)
        + _outside_attention(costs, tower, images * grid**2)
        + moved(2 * 2 * padded_bytes, 2 * 2 * padded_bytes)  # cut into windows and put together again
    )


def sam_global_block(costs: VisionCost, images: float) -> UnitWork:
    grid = costs.sam.image_size // costs.sam.patch_size
    return _grid_attention(costs, grid, images) + _outside_attention(costs, costs.sam, images * grid**2)


def sam_neck_input(costs: VisionCost, images: float) -> UnitWork:
    """The neck's first convolution and norm, and the HD neck's."""
    return _necks(costs, images, costs.sam.width)


def sam_neck_output(costs: VisionCost, images: float) -> UnitWork:
    """The neck's 3x3 convolution and norm, the HD neck's, and their sum."""
    tower = costs.sam
    features_bytes = (
        images * (tower.image_size // tower.patch_size) ** 2 * tower.neck_width * costs.element_bytes
    )
    joined = residual(features_bytes) if tower.hd_layer is not None else UnitWork()
    return _necks(costs, images, 9 * tower.neck_width) + joined


def sam_downsample(costs: VisionCost, images: float) -> UnitWork:
    """Resizing in fp32, then the strided 3x3 convolutions."""
    tower = costs.sam
    side = tower.resized_grid
    before = images * (tower.image_size // tower.patch_size) ** 2 * tower.neck_width
    resized = images * side**2 * tower.neck_width
    resize_bytes = (before + resized) * (costs.element_bytes + 2 * FP32_BYTES)
    convolutions = moved(resize_bytes, resize_bytes)
    for inputs, outputs in pairwise([tower.neck_width, *tower.downsample_widths]):
        side //= 2
        convolutions += linear(images * side**2, 9 * inputs, outputs, costs.element_bytes)
    return convolutions


def adaptor_sam(costs: VisionCost, images: float) -> UnitWork:
    """The high-resolution tower's own first layer, in adaptors that give it one."""
    return _adaptor_input(costs, images, "sam")


def adaptor_siglip(costs: VisionCost, images: float) -> UnitWork:
    """The low-resolution tower's own first layer, in adaptors that give it one."""
    return _adaptor_input(costs, images, "siglip")


def adaptor_joined(costs: VisionCost, images: float) -> UnitWork:
    """The first layer over all towers' features (one tower, or `shared_mlp_gelu`)."""
    width = sum(tower_widths(costs.model).values())
    rows = images * tokens_per_image(costs.model)
    return linear(rows, width, costs.model.language.hidden_size, costs.element_bytes)


def adaptor_output(costs: VisionCost, images: float) -> UnitWork:
    """What follows the first layer: `depth - 1` times GELU and a linear layer."""
    adaptor, hidden = costs.model.vision.adaptor, costs.model.language.hidden_size
    rows = images * tokens_per_image(costs.model)
    if adaptor.kind == "separate_mlp_gelu":
        layer = linear(rows, hidden // 2, hidden // 2, costs.element_bytes) * 2
    else:
        layer = linear(rows, hidden, hidden, costs.element_bytes)
    layer += activation(rows * hidden * costs.element_bytes)
    return layer * (adaptor.depth - 1)


def _patch(costs: VisionCost, tower: SiglipConfig | SamConfig, images: float) -> UnitWork:
    patches = images * (tower.image_size // tower.patch_size) ** 2
    pixel_bytes = images * COLOURS * tower.image_size**2 * (1 + 4 * FP32_BYTES + costs.element_bytes)
    read = Work(moved_bytes=pixel_bytes + 3 * patches * tower.width * costs.element_bytes)
    return UnitWork(forward=read) + linear(
        patches, COLOURS * tower.patch_size**2, tower.width, costs.element_bytes
    )


def _projections(costs: VisionCost, width: int, rows: float) -> UnitWork:
    """Queries, keys and values; attention's output."""
    qkv_bytes = 3 * rows * width * costs.element_bytes
    return (
        linear(rows, width, 3 * width, costs.element_bytes)
        + linear(rows, width, width, costs.element_bytes)
        + moved(2 * qkv_bytes, 2 * qkv_bytes)  # heads apart
    )


def _outside_attention(costs: VisionCost, tower: SiglipConfig | SamConfig, rows: float) -> UnitWork:
    """Norms, residuals and the MLP of a block."""
    stream_bytes = rows * tower.width * costs.element_bytes
    return (
        linear(rows, tower.width, tower.ffn_hidden_size, costs.element_bytes)
        + linear(rows, tower.ffn_hidden_size, tower.width, costs.element_bytes)
        + activation(rows * tower.ffn_hidden_size * costs.element_bytes)
        + norm(stream_bytes) * 2
        + residual(stream_bytes) * 2
    )


def _grid_attention(costs: VisionCost, side: int, grids: float) -> UnitWork:
    """Attention with relative positions over `grids` grids of side x side.

    Positions give every query a number per row and column of the grid. Folded, these lengthen queries and keys, and
    values are padded to the same head size; else they are added to the scores as a bias.
    """
    tower, rows = costs.sam, grids * side**2
    head_size = tower.width // tower.num_heads
    positions = Work(matmul_flops=2 * rows * tower.width * 2 * side)
    scored_width = tower.width
    pairs = rows * side**2
    if costs.folded_positions:
        padded = -(-(head_size + 2 * side) // FUSED_MULTIPLE) * FUSED_MULTIPLE
        scored_width = tower.num_heads * padded
        folding_bytes = 3 * rows * (tower.width + 2 * scored_width) * costs.element_bytes
    else:
        folding_bytes = 3 * pairs * tower.num_heads * costs.element_bytes
    return (
        _projections(costs, tower.width, rows)
        + UnitWork(forward=positions, input_gradient=positions, weight_gradient=positions)
        + attention(pairs, scored_width, scored_width)
        + moved(folding_bytes, folding_bytes)
    )


def _necks(costs: VisionCost, images: float, inputs: int) -> UnitWork:
    tower = costs.sam
    rows = images * (tower.image_size // tower.patch_size) ** 2
    count = 1 if tower.hd_layer is None else 2
    features_bytes = rows * tower.neck_width * costs.element_bytes
    return (linear(rows, inputs, tower.neck_width, costs.element_bytes) + norm(features_bytes)) * count


def _adaptor_input(costs: VisionCost, images: float, tower: str) -> UnitWork:
    rows, width = images * tokens_per_image(costs.model), tower_widths(costs.model)[tower]
    hidden = costs.model.language.hidden_size
    if costs.model.vision.adaptor.kind in POOLING_ADAPTORS:
        return linear(rows / 2, 2 * width, hidden, costs.element_bytes)
    return linear(rows, width, hidden // 2, costs.element_bytes)


UNITS: dict[str, Callable[[VisionCost, float], UnitWork]] = {
    "siglip_patch": siglip_patch,
    "siglip_block": siglip_block,
    "sam_patch": sam_patch,
    "sam_window_block": sam_window_block,
    "sam_global_block": sam_global_block,
    "sam_neck_input": sam_neck_input,
    "sam_neck_output": sam_neck_output,
    "sam_downsample": sam_downsample,
    "adaptor_sam": adaptor_sam,
    "adaptor_siglip": adaptor_siglip,
    "adaptor_joined": adaptor_joined,
    "adaptor_output": adaptor_output,
}
