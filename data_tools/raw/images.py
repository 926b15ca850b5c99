"""Image files of a record: bounded, decoded once, taken as they are."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_tools.raw.records import RecordError
from megatron_vl.data.images import FORMATS

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # MPO: a phone's JPEG with a second one


def read_images(folder: Path, names: Sequence[str], *, max_bytes: int, max_pixels: int) -> dict[str, bytes]:
    """The files `names` of `folder` as a sample holds them: "0.jpg", "1.png", …, named by their content.

    Raises RecordError where one is missing, cannot be decoded or has more than `max_pixels`, or where
    together they exceed `max_bytes`.
    """
    files = {}
    for number, name in enumerate(names):
        data = _read(folder / name, max_bytes)
        max_bytes -= len(data)
        files[f"{number}.{_extension(data, folder / name, max_pixels)}"] = data
    return files


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise RecordError(
                "sample too large", f"{path} has {size} bytes; data.max_sample_bytes leaves {max_bytes}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise RecordError("missing image", f"{path} cannot be read: {error}") from error


def _extension(data: bytes, path: Path, max_pixels: int) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                detail = f"{path} has {width} x {height} pixels; data.max_image_pixels is {max_pixels}"
                raise RecordError("image beyond the pixel limit", detail)
            image.load()
            return EXTENSIONS[str(image.format)]
    except RecordError:
        raise
    except Exception as error:  # on garbage, Pillow's plugins raise many kinds
        raise RecordError("image cannot be decoded", f"{path}: {error}") from error
