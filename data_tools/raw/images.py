"""Image files of a record: bounded, decoded once, taken as they are."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_tools.raw.format import RecordError
from megatron_vl.data.images import FORMATS

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # MPO: a phone's JPEG with a second one


def read_images(
    folder: Path, images: Sequence[str | bytes], *, max_bytes: int, max_pixels: int
) -> dict[str, bytes]:
    """Files of `folder` by name, or bytes, as a sample holds them: "0.jpg", "1.png", …, named by their content.

    Raises RecordError where one is missing, is not below `folder`, cannot be decoded or has more than
    `max_pixels`, or where together they exceed `max_bytes`.
    """
    files = {}
    for number, image in enumerate(images):
        if isinstance(image, str):
            where, data = str(folder / image), _read(folder, image, max_bytes)
        else:
            where, data = f"image {number}", image
        max_bytes -= len(data)
        if max_bytes < 0:
            raise RecordError("sample too large", f"{where} has {len(data)} bytes; {-max_bytes} too many")
        files[f"{number}.{_extension(data, where, max_pixels)}"] = data
    return files


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    path = folder / name
    try:
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # links may lead anywhere
            raise RecordError("image outside its folder", f"{name!r} leads out of {folder}")
        size = path.stat().st_size
        if size > max_bytes:
            raise RecordError(
                "sample too large", f"{path} has {size} bytes; data.max_sample_bytes leaves {max_bytes}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise RecordError("missing image", f"{path} cannot be read: {error}") from error


def _extension(data: bytes, where: str, max_pixels: int) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                detail = f"{where} has {width} x {height} pixels; data.max_image_pixels is {max_pixels}"
                raise RecordError("image beyond the pixel limit", detail)
            image.load()
            return EXTENSIONS[str(image.format)]
    except RecordError:
        raise
    except Exception as error:  # on garbage, Pillow's plugins raise many kinds
        raise RecordError("image cannot be decoded", f"{where}: {error}") from error
