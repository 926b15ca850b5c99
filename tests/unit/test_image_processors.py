"""Images become what transformers' processors make of them, within 2 levels of 255, and what the official code does.

Shapes: C channels, H W pixels.
"""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from megatron_vl.config.model import SamConfig, SiglipConfig
from megatron_vl.data.images import ImageRule, decode_image
from megatron_vl.model.vit import VisionEncoder

SIGLIP, SAM = SiglipConfig(), SamConfig()
# From 1:72 to 20:1; the sides of some are whole numbers after resizing, those of others have to be rounded.
SIZES = [
    (384, 384),
    (1000, 333),
    (333, 1000),
    (640, 480),
    (37, 2664),
    (2000, 100),
    (1023, 1024),
    (50, 77),
    (500, 384),
]
MOST_LEVELS, MEAN_LEVELS = 2.001, 0.01


def picture(width: int, height: int) -> Image.Image:
    """Smooth shapes with edges, so that a shift of one row shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x // 9 + y // 7) % 2 * 200], -1
    )
    return Image.fromarray(pixels.astype(np.uint8))


def ours(image: Image.Image, config: SiglipConfig | SamConfig, rounding: str) -> Tensor:
    """The square that training reads, [C, H, W], at the size and padding of a tower."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    red, green, blue = config.mean
    rule = ImageRule(size=config.image_size, mean=(red, green, blue), max_pixels=10**8, rounding=rounding)
    return torch.from_numpy(decode_image(file.getvalue(), rule, "key", "shard"))


def normalized(square_CHW: Tensor, config: SiglipConfig | SamConfig) -> Tensor:
    """As a tower takes it."""
    return VisionEncoder(config, num_tokens=1, output_width=1).normalize(square_CHW[None] / 255)[0]


def levels(difference_CHW: Tensor, config: SiglipConfig | SamConfig) -> Tensor:
    """A difference of normalised images, in levels of 255."""
    return difference_CHW.abs() * 255 * torch.tensor(config.std)[:, None, None]


@pytest.fixture(autouse=True)
def width_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow resizes the width, rounds, then the height, as torch does; Pillow 13 turns that round for tall images,
    whose edges then differ by more than rounding."""
    whole = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        return whole(whole(image, (size[0], image.height), *args, **options), size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)


def siglip_processor() -> DeepseekVLImageProcessorPil:
    return DeepseekVLImageProcessorPil(image_mean=SIGLIP.mean, image_std=SIGLIP.std)


def hybrid_processor() -> DeepseekVLHybridImageProcessorPil:
    """The small image is made of the large one, bilinear, as the exported configuration says."""
    return DeepseekVLHybridImageProcessorPil(image_mean=SIGLIP.mean, image_std=SIGLIP.std, resample=2)


@pytest.mark.parametrize("size", SIZES)
def test_siglip(size: tuple[int, int]) -> None:
    image = picture(*size)
    (theirs,) = siglip_processor()(image, return_tensors="pt")["pixel_values"]
    difference = levels(normalized(ours(image, SIGLIP, "round"), SIGLIP) - theirs, SIGLIP)
    assert difference.max() <= MOST_LEVELS
    assert difference.mean() < MEAN_LEVELS


@pytest.mark.parametrize("size", SIZES)
def test_hybrid(size: tuple[int, int]) -> None:
    """The small image: the official code keeps fractions of a colour where transformers rounds to whole ones."""
    image = picture(*size)
    theirs = hybrid_processor()(image, return_tensors="pt")
    square = ours(image, SAM, "round")
    large = levels(normalized(square, SAM) - theirs["high_res_pixel_values"][0], SAM)
    assert large.max() <= MOST_LEVELS
    assert large.mean() < MEAN_LEVELS
    small = levels(normalized(square, SIGLIP) - theirs["pixel_values"][0], SIGLIP)
    assert small.max() <= MOST_LEVELS
    assert small.mean() <= 0.5


def test_the_official_code_truncates_where_transformers_rounds() -> None:
    """1000 x 333 at 384: 127.87 rows are 127 in the official code and 128 in transformers."""
    image = picture(1000, 333)
    background = torch.tensor([127, 127, 127], dtype=torch.uint8)

    def rows(rounding: str) -> int:
        square = ours(image, SIGLIP, rounding)
        return int((square != background[:, None, None]).any(0).any(1).sum())

    assert (rows("truncate"), rows("round")) == (127, 128)
