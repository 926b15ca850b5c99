"""JSON objects whose images and annotations lie in lists of their own (COCO, COCO-Text, TextOCR), and objects
that map names to values (LSVT, ArT); read piece by piece.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.raw.format import RecordError
from data_tools.raw.json_text import FormatError, JsonText, Value
from data_tools.raw.places import Place, Places
from data_tools.raw.records import Span, Spans
from megatron_vl.config.errors import UserError

IMAGES, ANNOTATIONS = ("images", "imgs"), ("annotations", "anns")


@dataclass(frozen=True, kw_only=True)
class Joined:
    """An image and annotations of it; `number` counts them in the order of the images."""

    number: int
    image: Span
    annotations: tuple[Span, ...]

    def __str__(self) -> str:
        return f"record {self.number}"

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """The image's fields, with `annotations`. Raises RecordError."""
        image = self.image.read(path, max_bytes)
        if not isinstance(image, dict):
            raise RecordError("not a record", f"an image is a {type(image).__name__}; an object is needed")
        return {**image, "annotations": [one.read(path, max_bytes) for one in self.annotations]}


class JoinedPlaces(Places[Joined]):
    """D records of I images and A annotations.

    `images` [I, 2] and `annotations` [A, 2], sorted by image, are offsets and sizes; record d is of the image
    `image_of` [D] and has the annotations starts[d] to starts[d + 1].
    """

    def __init__(self, images: Any, annotations: Any, image_of: Any, starts: Any) -> None:
        self._images: NDArray[np.int64] = images
        self._annotations: NDArray[np.int64] = annotations
        self._image_of: NDArray[np.int64] = image_of
        self._starts: NDArray[np.int64] = starts

    def __len__(self) -> int:
        return len(self._image_of)

    def _at(self, number: int) -> Joined:
        (offset, size), (start, end) = self._images[self._image_of[number]], self._starts[number : number + 2]
        spans = self._annotations[start:end].tolist()
        return Joined(
            number=number,
            image=Span(number=number, offset=int(offset), size=int(size)),
            annotations=tuple(Span(number=number, offset=offset, size=size) for offset, size in spans),
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key of an object with its value."""

    span: Span

    def __str__(self) -> str:
        return f"entry {self.span.number}"

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """{key: value}. Raises RecordError."""
        entry: dict[str, Any] = json.loads(b"{" + self.span.read_bytes(path, max_bytes) + b"}")
        return entry


class Entries(Places[Place]):
    """The entries of an object."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def _at(self, number: int) -> Entry:
        return Entry(span=self._spans[number])


def is_object(path: Path) -> bool:
    """Whether the file is a .json that holds one object."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with JsonText(path, 0) as text:
        return text.peek() == "{"


def locate_annotations(path: Path, field: str, max_bytes: int) -> JoinedPlaces:
    """A record for each annotation, as COCO's captions are. Raises UserError as `locate_records` does."""
    images, annotations, image_of = _join(path, field, max_bytes)
    return JoinedPlaces(images, annotations, image_of, np.arange(len(image_of) + 1))


def locate_images(path: Path, field: str, max_bytes: int) -> JoinedPlaces:
    """A record for each image that has annotations. Raises UserError as `locate_records` does."""
    images, annotations, image_of = _join(path, field, max_bytes)
    annotated, first = np.unique(image_of, return_index=True)
    return JoinedPlaces(images, annotations, annotated, np.append(first, len(image_of)))


def locate_entries(path: Path, field: str, max_bytes: int) -> Entries:
    """A record for each key. Raises UserError as `locate_records` does."""
    try:
        with JsonText(path, max_bytes) as text:
            values = text.elements("entry")
            spans = Spans((value.start, value.offset + value.size - value.start) for value in values)
            text.expect_end("the object")
            return Entries(spans)
    except (FormatError, UnicodeDecodeError) as error:
        raise UserError(f"{field} has {path}: {error}") from error


def has_lists(path: Path, max_bytes: int) -> bool:
    """Whether an object's first key is one of those that `locate_images` knows, or of what lies beside them."""
    with JsonText(path, max_bytes) as text:
        return next(text.members(), "") in (*IMAGES, *ANNOTATIONS, "info", "cats", "licenses", "imgToAnns")


def _join(path: Path, field: str, max_bytes: int) -> tuple[Any, Any, Any]:
    """Images [I, 2]; annotations [A, 2], and the image of each [A], ordered by image, then by place."""
    try:
        images, annotations = _lists(path, max_bytes)
    except (FormatError, UnicodeDecodeError) as error:
        raise UserError(f"{field} has {path}: {error}") from error
    numbers = {identity: number for number, (identity, _, _) in enumerate(images)}
    unknown = next((one for one in annotations if one[0] not in numbers), None)
    if unknown is not None:
        raise UserError(
            f"{field} has {path}: an annotation is of image {unknown[0]!r}, which is none of its images"
        )
    image_of = np.array([numbers[one[0]] for one in annotations], dtype=np.int64)
    order = np.argsort(image_of, kind="stable")
    spans = np.array([one[1:] for one in annotations], dtype=np.int64).reshape(-1, 2)
    return np.array([one[1:] for one in images], dtype=np.int64).reshape(-1, 2), spans[order], image_of[order]


def _lists(path: Path, max_bytes: int) -> tuple[list[tuple[Any, int, int]], list[tuple[Any, int, int]]]:
    """Identity, offset and size of every image, and of the image of every annotation."""
    images: list[tuple[Any, int, int]] | None = None
    annotations: list[tuple[Any, int, int]] | None = None
    with JsonText(path, max_bytes) as text:
        for key in text.members():
            if key in IMAGES:
                images = [_identified(value, "id") for value in text.elements("image")]
            elif key in ANNOTATIONS:
                annotations = [_identified(value, "image_id") for value in text.elements("annotation")]
            else:
                text.skip(key)
        text.expect_end("the object")
    if images is None or annotations is None:
        raise FormatError(f"an object must have {' or '.join(IMAGES)}, and {' or '.join(ANNOTATIONS)}")
    return images, annotations


def _identified(value: Value, name: str) -> tuple[Any, int, int]:
    identity = value.content.get(name) if isinstance(value.content, dict) else None
    if not isinstance(identity, int | str):
        raise FormatError(f"what lies at byte {value.offset} has no {name}")
    return identity, value.offset, value.size
