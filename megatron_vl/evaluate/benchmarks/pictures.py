"""Images of benchmarks: in base64, in a parquet file, in a folder."""

import base64
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vl.evaluate.benchmarks.files import Row
from megatron_vl.evaluate.items import ImageFile

MAX_IMAGE_BYTES = 64 << 20  # encoded


def from_base64(row: Row, text: str) -> ImageFile:
    """An image in base64. Raises UserError where it is not that, or too large."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise row.error(f"image is no base64 ({error})") from None
    return ImageFile(name=row.place, data=_checked(row, data))


def from_column(row: Row, name: str, images: Path | None) -> ImageFile | None:
    """An image column: {bytes, path} as `datasets` writes it to parquet, or a path in the folder of images.

    None where the field is absent or null. Raises UserError as the others do.
    """
    value: Any = row.fields.get(name)
    if isinstance(value, dict):
        data = value.get("bytes")
        if data is None:
            value = value.get("path")
        elif isinstance(data, bytes):
            return ImageFile(name=f"{row.place}, {name}", data=_checked(row, data))
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise row.error(f"{name} is a {type(value).__name__}; it must be an image's bytes or its path")
    return from_folder(row, value, images)


def from_folder(row: Row, name: str, images: Path | None) -> ImageFile:
    """An image file. Raises UserError without a folder, and where the file is outside it, missing or too large."""
    if images is None:
        raise row.error(f"its image {name!r} needs the folder of the benchmark's images, and none is given")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise row.error(f"its image is {name!r}; it must be a path inside of {images}")
    path = images / relative
    if not path.is_file():
        raise row.error(f"its image {path} does not exist")
    size = path.stat().st_size
    if not 0 < size <= MAX_IMAGE_BYTES:
        raise row.error(f"its image {path} has {size} bytes; it must have 1 to {MAX_IMAGE_BYTES}")
    return ImageFile(name=str(path), path=path)


def _checked(row: Row, data: bytes) -> bytes:
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise row.error(f"its image has {len(data)} bytes; it must have 1 to {MAX_IMAGE_BYTES}")
    return data
