"""From an image file's bytes to the padded square that the vision encoders take."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_FORMATS, SampleError

FORMATS = tuple(dict.fromkeys(IMAGE_FORMATS.values()))
EXIF_ORIENTATION = 0x0112
MIN_SIDE = 14  # of a resized image: the official code's `min_size`
# How the short side of a resized image becomes a whole number: as in the official code, or as in transformers.
ROUNDINGS: dict[str, Callable[[float], int]] = {"truncate": int, "round": round}

# Pillow's own limit is off: it only warns, up to twice its value. `decode_image` has one, on the header.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, kw_only=True)
class ImageRule:
    """The square that images become: its side and padding colour, those of the largest encoder input.

    `mean` are the channel means, in [0, 1], of that encoder; `max_pixels` bounds width x height. `rounding`, of
    ROUNDINGS, decides one row or column of pixels.

    Raises:
        UserError: there is no such rounding.
    """

    size: int
    mean: tuple[float, float, float]
    max_pixels: int
    rounding: str = "truncate"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise UserError(f"data.image_rounding={self.rounding}: must be one of {', '.join(ROUNDINGS)}")

    @property
    def background(self) -> tuple[int, int, int]:
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How many tokens images become: the adaptor's output grid, fixed. Tiling would look at sizes."""

    tokens_per_image: int

    def count(self, image_sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of each image [N] from its width and height [N, 2]."""
        return np.full(len(image_sizes), self.tokens_per_image, dtype=np.int64)


def read_size(data: bytes) -> tuple[int, int]:
    """Upright (width, height) from the header alone; (0, 0) where no decoder understands it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _upright_size(image)
    except (
        Exception
    ):  # on garbage, Pillow's plugins raise OSError, SyntaxError, struct.error, IndexError and more
        return 0, 0


def decode_image(data: bytes, rule: ImageRule, key: str, shard: str) -> NDArray[np.uint8]:
    """The image as uint8 [3, size, size]: upright, on white, its long side resized to `size`, centred.

    As the official DeepSeek-VL code does it (image_processing_vlm.py): bicubic, sides truncated. Raises
    SampleError where the header says more pixels than the rule allows, before decoding, and where decoding
    fails.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > rule.max_pixels:
                detail = f"{width} x {height} pixels; data.max_image_pixels is {rule.max_pixels}"
                raise SampleError("image beyond the pixel limit", key, shard, detail)
            upright = _on_white(ImageOps.exif_transpose(image))
    except SampleError:
        raise
    except UnidentifiedImageError as error:  # its own words name an object in memory
        detail = f"it is none of {', '.join(FORMATS)}"
        raise SampleError("image cannot be decoded", key, shard, detail) from error
    except Exception as error:  # see read_size
        raise SampleError("image cannot be decoded", key, shard, str(error)) from error
    return pad_to_square(upright, rule)


def pad_to_square(image: Image.Image, rule: ImageRule) -> NDArray[np.uint8]:
    """An RGB image as uint8 [3, size, size]; in the official code's arithmetic, so that pixels are equal."""
    long_side, whole = max(image.size), ROUNDINGS[rule.rounding]
    width, height = (max(whole(side / long_side * rule.size), MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (rule.size, rule.size), rule.background)
    square.paste(resized, ((rule.size - width) // 2, (rule.size - height) // 2))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    sideways = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (height, width) if sideways else (width, height)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
