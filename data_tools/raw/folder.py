"""A folder of images with their captions in .txt files of the same names beside them, below it too."""

import hashlib
from pathlib import Path
from typing import Any

from data_tools.raw.format import RecordError
from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_FORMATS

CAPTION_SUFFIX = ".txt"


def locate_images(folder: Path, field: str) -> list[str]:
    """The names of a folder's images, relative to it, in order. Raises UserError, naming `field`, for none."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower().removeprefix(".") in IMAGE_FORMATS
    )
    if not names:
        raise UserError(f"{field} is {folder}, which holds no images ({', '.join(IMAGE_FORMATS)})")
    return names


def read_pair(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """An image and its caption as a record of the format captions.

    Raises RecordError where the .txt is missing, larger than `max_bytes` or no UTF-8.
    """
    path = (folder / name).with_suffix(CAPTION_SUFFIX)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise RecordError(
                "sample too large", f"{path} has {size} bytes; data.max_sample_bytes is {max_bytes}"
            )
        return {"image": name, "caption": path.read_text(encoding="utf-8").strip()}
    except OSError as error:
        raise RecordError("no text", f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError("no text", f"{path} is no UTF-8: {error}") from error


def digest_of(folder: Path) -> str:
    """Differs where the captions or the names of files do; images are not read for it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.relative_to(folder).as_posix().encode(errors="surrogateescape") + b"\0")
        if path.suffix == CAPTION_SUFFIX and path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
