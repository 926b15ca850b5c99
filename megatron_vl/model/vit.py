"""What the vision transformers share: the face of an encoder, the MLP, recompute of a block.

Shapes: N images, C channels (3 colours or the transformer's width), H W pixels, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vl.config.model import SamConfig, SiglipConfig


class VisionEncoder(nn.Module):
    """A tower: its patch embedding, and what those who call it need to know.

    `image_size`: side in pixels of the square it takes; `num_tokens` and `output_width`: the shape of its
    features for one image.
    Mean and standard deviation are numbers, not buffers, so that casting the module leaves them exact.
    """

    blocks: nn.ModuleList

    def __init__(self, config: SiglipConfig | SamConfig, *, num_tokens: int, output_width: int) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.num_tokens = num_tokens
        self.output_width = output_width
        self.mean = tuple(config.mean)
        self.std = tuple(config.std)
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def normalize(self, unit_NCHW: Tensor) -> Tensor:
        """Images in [0, 1], in fp32, of any size -> what `forward` takes: resized, normalised, cast.

        Resizing comes before normalising, with antialiasing, as in the released models' processing.
        """
        size = (self.image_size, self.image_size)
        if unit_NCHW.shape[2:] != size:
            unit_NCHW = F.interpolate(unit_NCHW, size, mode="bilinear", align_corners=False, antialias=True)
        # Filled on the device: a copy of the numbers from the host would wait for it.
        mean_C11, std_C11 = (
            torch.stack([unit_NCHW.new_full((1, 1), value) for value in values])
            for values in (self.mean, self.std)
        )
        # One pass over the pixels: x / std - mean / std.
        normalized_NCHW = torch.addcmul(-mean_C11 / std_C11, unit_NCHW, 1 / std_C11)
        return normalized_NCHW.to(self.patch_embed.weight.dtype)

    def forward(self, image_NCHW: Tensor, recompute: bool = False) -> Tensor:
        """Images as `normalize` returns them -> features [N, num_tokens, output_width].

        With `recompute` no activations inside a block are kept for the backward pass.
        """
        raise NotImplementedError


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_hidden_size)
        self.fc2 = nn.Linear(ffn_hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., width], kept."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """`block(x)`; with `recompute` its activations are not kept but computed again in the backward pass."""
    y: Tensor
    if recompute and torch.is_grad_enabled():
        y = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    else:
        y = block(x)
    return y
