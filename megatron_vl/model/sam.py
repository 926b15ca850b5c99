"""SAM's image encoder as DeepSeek-VL uses it: ViTDet, neck, downsampling, HD branch (arXiv 2304.02643;
DeepSeek-VL, section 3.1).

Shapes: N images, B images or windows, C channels, H W pixels or grid, S window side, T tokens, A attention
heads, D head size.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vl.config.model import SamConfig
from megatron_vl.config.model_check import sam_tokens
from megatron_vl.model.relative_attention import relative_attention
from megatron_vl.model.vit import Mlp, VisionEncoder, run_block


class SamEncoder(VisionEncoder):
    """Trunk -> neck -> resize -> strided convolutions; the HD branch joins after its own neck."""

    def __init__(self, config: SamConfig) -> None:
        widths = [config.neck_width, *config.downsample_widths]
        super().__init__(config, num_tokens=sam_tokens(config), output_width=widths[-1])
        grid = config.image_size // config.patch_size
        self.resized_grid = config.resized_grid
        self.hd_layer = config.hd_layer
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.width))
        self.blocks = nn.ModuleList(SamBlock(config, index) for index in range(config.num_layers))
        self.neck = make_neck(config)
        self.downsamples = nn.Sequential(
            *(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(widths))
        )
        if config.hd_layer is not None:
            self.neck_hd = make_neck(config)
            self.hd_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, image_NCHW: Tensor, recompute: bool = False) -> Tensor:
        """See VisionEncoder."""
        x_NHWC = self.patch_embed(image_NCHW).permute(0, 2, 3, 1) + self.pos_embed
        hd_NHWC = None
        for index, block in enumerate(self.blocks):
            x_NHWC = run_block(block, x_NHWC, recompute)
            if index == self.hd_layer:
                hd_NHWC = x_NHWC
        features_NCHW = self.neck(x_NHWC.permute(0, 3, 1, 2))
        if hd_NHWC is not None:
            # Published: added after downsampling. That is linear, so adding here is equal and half the work.
            features_NCHW = features_NCHW + self.hd_alpha * self.neck_hd(hd_NHWC.permute(0, 3, 1, 2))
        return self.downsample(features_NCHW).flatten(2).transpose(1, 2)

    def downsample(self, features_NCHW: Tensor) -> Tensor:
        """Resize to `resized_grid`, in fp32 whatever the weights' dtype, then the strided convolutions."""
        size = (self.resized_grid, self.resized_grid)
        resized_NCHW = F.interpolate(features_NCHW.float(), size, mode="bilinear", align_corners=False)
        downsampled_NCHW: Tensor = self.downsamples(resized_NCHW.to(features_NCHW.dtype))
        return downsampled_NCHW


class SamBlock(nn.Module):
    """Pre-norm attention, in windows or over the whole grid, and MLP."""

    def __init__(self, config: SamConfig, index: int) -> None:
        super().__init__()
        is_global = index in config.global_layers
        grid = config.image_size // config.patch_size
        self.window_size = grid if is_global else config.window_size
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attn = GridAttention(config.width, config.num_heads, self.window_size)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.mlp = Mlp(config.width, config.ffn_hidden_size)

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Shape [N, H, W, C], kept."""
        _, height, width, _ = x_NHWC.shape
        windows_BSSC = partition(self.norm1(x_NHWC), self.window_size)
        x_NHWC = x_NHWC + unpartition(self.attn(windows_BSSC), height, width)
        y_NHWC: Tensor = x_NHWC + self.mlp(self.norm2(x_NHWC))
        return y_NHWC


class GridAttention(nn.Module):
    """Multi-head self-attention over a square grid, with a learned vector per row and column offset."""

    def __init__(self, width: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // num_heads))

    def forward(self, x_BSSC: Tensor) -> Tensor:
        """Shape [B, S, S, C], kept."""
        qkv_BT3AD = self.qkv(x_BSSC).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q_BATD, k_BATD, v_BATD = qkv_BT3AD.permute(2, 0, 3, 1, 4).unbind()
        side = torch.arange(x_BSSC.shape[1], device=x_BSSC.device)
        offset_SS = side[:, None] - side[None, :] + len(side) - 1  # from query to key, counted from 0
        y_BATD = relative_attention(
            q_BATD, k_BATD, v_BATD, self.rel_pos_h[offset_SS], self.rel_pos_w[offset_SS]
        )
        y_BSSC: Tensor = self.proj(y_BATD.transpose(1, 2).reshape(x_BSSC.shape))
        return y_BSSC


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shape [N, C, H, W], kept."""
        return super().forward(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_neck(config: SamConfig) -> nn.Sequential:
    """From the trunk's width to the neck's, on [N, C, H, W]."""
    width = config.neck_width
    return nn.Sequential(
        nn.Conv2d(config.width, width, 1, bias=False),
        LayerNorm2d(width, eps=config.norm_epsilon),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width, eps=config.norm_epsilon),
    )


def partition(x_NHWC: Tensor, side: int) -> Tensor:
    """Windows [N * number of windows, side, side, C], row by row; zeros fill those that reach past the grid.

    The padding takes part in attention, as in the released model.
    """
    x_NHWC = F.pad(x_NHWC, (0, 0, 0, -x_NHWC.shape[2] % side, 0, -x_NHWC.shape[1] % side))
    num_images, height, width, channels = x_NHWC.shape
    windows = x_NHWC.reshape(num_images, height // side, side, width // side, side, channels)
    return windows.transpose(2, 3).flatten(0, 2)


def unpartition(windows_BSSC: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `partition`: [N, height, width, C], without the padding."""
    _, side, _, channels = windows_BSSC.shape
    rows, columns = -(-height // side), -(-width // side)
    windows = windows_BSSC.reshape(-1, rows, columns, side, side, channels).transpose(2, 3)
    return windows.reshape(-1, rows * side, columns * side, channels)[:, :height, :width]
