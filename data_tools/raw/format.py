"""What a format of raw material is: how its drafts are listed, and what samples one of them holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.data import RawConfig


class RecordError(Exception):
    """What cannot be used. `cause` is a category to count by, `detail` its own, `name` what it calls itself."""

    def __init__(self, cause: str, detail: str, name: str = "") -> None:
        super().__init__(cause, detail, name)
        self.cause, self.detail, self.name = cause, detail, name


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """What raw material says: the fields of KEY.json, and its images in the order of their marks.

    An image is a file's name, relative to the source's folder of images, or the bytes of one. `name` is told
    where the sample cannot be used, after its draft's place.
    """

    fields: dict[str, Any]
    images: Sequence[str | bytes] = ()
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a source is made of, and what bounds it; known to the processes that render."""

    source: str
    raw: RawConfig
    image_folder: Path
    modality: str
    has_heldout: bool
    max_sample_bytes: int
    max_image_pixels: int

    @property
    def file(self) -> Path:
        """`raw.file`, a file or a folder."""
        return Path(self.raw.file)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A value of `data.sources.SOURCE.raw.format`. All are functions of a module: other processes call them.

    `drafts(material, field)` lists the material without reading it all: each draft is small, such as a place in
    a file, and `str(draft)` says where it is. Raises UserError, naming the configuration's `field`, where the
    material as a whole is unusable.

    `read(material, draft)` gives a draft's samples, at least one, in order; a page of a document that cannot be
    used stands as a RecordError in the place of its sample. Raises RecordError where none can be used.

    `digest(material)` differs where samples may; the images that records name are not read for it.
    """

    drafts: Callable[[Material, str], Sequence[Any]]
    read: Callable[[Material, Any], Sequence[RawSample | RecordError]]
    digest: Callable[[Material], str]
    of_folder: bool = False  # whether `raw.file` is a folder that holds the images too
