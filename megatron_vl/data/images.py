"""From an image file's bytes to the padded square that the vision encoders take.

Decoded once, resized once, in whole levels of 0 to 255; the encoders take it from there on the device. H, W pixels.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_FORMATS, SampleError

FORMATS = tuple(dict.fromkeys(IMAGE_FORMATS.values()))
EXIF_ORIENTATION = 0x0112
SIDEWAYS = 5  # and from there on: rows are stored as columns
FLIPS = (
    (1, 1),
    (1, -1),
    (-1, -1),
    (-1, 1),
)  # steps along rows and columns for orientations 1 to 4, and 5 to 8
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


def read_size(data: bytes) -> tuple[int, int]:
    """Upright (width, height) from the header alone; (0, 0) where no decoder understands it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= SIDEWAYS else (width, height)
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
            orientation = _orientation(image)
            stored_HW3 = _decode(image, data)
    except SampleError:
        raise
    except UnidentifiedImageError as error:  # its own words name an object in memory
        detail = f"it is none of {', '.join(FORMATS)}"
        raise SampleError("image cannot be decoded", key, shard, detail) from error
    except Exception as error:  # see read_size
        raise SampleError("image cannot be decoded", key, shard, str(error)) from error
    return _square(stored_HW3, orientation, rule)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, from what lies before the pixels: a PNG's own `getexif` would decode it to look behind them."""
    found = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)
    return int(found) if found in range(1, 9) else 1


def _decode(image: Image.Image, data: bytes) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] as they are stored. Raises as Pillow does."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode in ("L", "RGB"):
        # libjpeg-turbo itself: Pillow's pixels in a third of its time. What it complains of, Pillow decides.
        with contextlib.suppress(ValueError):
            if simplejpeg.decode_jpeg_header(data)[:2] == (image.height, image.width):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
                return pixels
    return np.array(_on_white(image))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _square(stored_HW3: NDArray[np.uint8], orientation: int, rule: ImageRule) -> NDArray[np.uint8]:
    """Pixels as stored, resized, then turned upright and laid on the background: uint8 [3, size, size]."""
    sides, whole = stored_HW3.shape[:2], ROUNDINGS[rule.rounding]
    height, width = (max(whole(side / max(sides) * rule.size), MIN_SIDE) for side in sides)
    picture_3HW = _resize(stored_HW3, height, width, is_sideways=orientation >= SIDEWAYS)
    if orientation >= SIDEWAYS:
        picture_3HW, height, width = picture_3HW.swapaxes(1, 2), width, height
    row_step, column_step = FLIPS[(orientation - 1) % 4]
    square = np.empty((3, rule.size, rule.size), dtype=np.uint8)
    for channel, colour in zip(square, rule.background, strict=True):
        channel.fill(colour)
    top, left = (rule.size - height) // 2, (rule.size - width) // 2
    square[:, top : top + height, left : left + width] = picture_3HW[:, ::row_step, ::column_step]
    return square


def _resize(
    stored_HW3: NDArray[np.uint8], height: int, width: int, *, is_sideways: bool
) -> NDArray[np.uint8]:
    """Antialiased bicubic on bytes, to [3, height, width]; one axis after the other, each within 1 level of Pillow.

    The upright picture's width comes first, so that what lies on its side gets the pixels that it would have if it were
    turned before, which costs seven times as much on a photograph. Where one side shrinks and the other must grow,
    shrinking comes first: a line of many pixels then needs no more memory than its file's pixels.
    """
    import torch  # seconds to import, and indexing reads no pixels
    from torch.nn.functional import interpolate

    pixels_13HW = torch.from_numpy(stored_HW3).permute(2, 0, 1)[None]
    lower, narrower = height < stored_HW3.shape[0], width < stored_HW3.shape[1]
    if lower if lower != narrower else is_sideways:  # by itself, torch begins with the width
        pixels_13HW = interpolate(pixels_13HW, (height, stored_HW3.shape[1]), mode="bicubic", antialias=True)
    resized_13HW = interpolate(pixels_13HW, (height, width), mode="bicubic", antialias=True)
    pixels: NDArray[np.uint8] = resized_13HW[0].numpy()
    return pixels
