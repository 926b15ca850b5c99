"""Text in scenes: an image, and the words that can be read in it, in reading order.

What describes an image becomes one record, whatever it comes in:

{"image": NAME, "words": [{"transcription": "Sales", "points": [[x, y], …]}, …]}

records       .json, .jsonl, .parquet or .tar files of such records
COCO-Text     and TextOCR: a .json object with imgs and anns
LSVT          and ArT: a .json object of image names
ICDAR         a folder of .txt files named as their images, or with gt_ before: x1,y1,…,x4,y4,TEXT a line; MLT's and
              RCTW's further column is passed over, and so is Task 2.1's form of two corners
PaddleOCR     a .txt file: NAME, a tab, and a JSON list of words a line
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.raw.containers import names_in, read_draft, records_digest, records_format
from data_tools.raw.fields import IMAGE_FIELDS, one_image, record_fields, unmarked
from data_tools.raw.files import files_digest, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.joined import has_lists, locate_entries, locate_images
from data_tools.raw.places import Draft, ItemDrafts, Place
from data_tools.raw.reading_order import Word, in_reading_order
from data_tools.raw.records import Span, locate_lines
from megatron_vl.data.sample import IMAGE_FORMATS, IMAGE_MARK

WORDS, TEXTS = ("words", "annotations"), ("transcription", "utf8_string", "text")
ILLEGIBLE = ("", "###", "#", "*", ".")  # ICDAR's, ReCTS's, RCTW's and TextOCR's marks
TRUTH_SUFFIX, TRUTH_PREFIX = ".txt", "gt_"
# MLT's column.
SCRIPTS = {"Arabic", "Bangla", "Chinese", "Hindi", "Japanese", "Korean", "Latin", "Mixed", "None", "Symbols"}
CORNERS = re.compile(r"\s*((?:-?\d+(?:\.\d+)?\s*,\s*){8}|(?:-?\d+(?:\.\d+)?\s*,\s*){4})(.*)")


def read_scene_text(record: Any, system: str) -> RawSample:
    """The image, then its words: a line of the image a line. Raises RecordError where nothing can be read."""
    del system
    fields = record_fields(record)
    if len(fields) == 1 and not set(fields) & set(IMAGE_FIELDS):  # an entry of LSVT or ArT
        ((name, words),) = fields.items()
        fields = {"image": name if PurePosixPath(name).suffix else f"{name}.jpg", "words": words}
    found = [fields[name] for name in WORDS if fields.get(name)]
    if len(found) != 1 or not isinstance(found[0], list):
        raise RecordError("no text", f"it must have one list of words, {' or '.join(WORDS)}")
    words = [_word(record_fields(word)) for word in found[0] if _is_legible(record_fields(word))]
    if not words:
        raise RecordError("no text", f"none of its {len(found[0])} words can be read")
    lines = [" ".join(word.text for word in line) for line in in_reading_order(words)]
    return RawSample(fields={"text": IMAGE_MARK + unmarked("\n".join(lines))}, images=[one_image(fields)])


def _transcription(word: dict[str, Any]) -> str:
    found = [word[name] for name in TEXTS if isinstance(word.get(name), str)]
    return " ".join(found[0].split()) if found else ""


def _is_legible(word: dict[str, Any]) -> bool:
    is_marked = word.get("illegibility") or word.get("ignore") or word.get("legibility") == "illegible"
    return not is_marked and _transcription(word) not in ILLEGIBLE


def _word(word: dict[str, Any]) -> Word:
    """`points`, pairs or one flat list, or `bbox`: left, top, width, height."""
    try:
        if word.get("points"):
            flat = [
                float(one)
                for point in word["points"]
                for one in (point if isinstance(point, list) else [point])
            ]
        else:
            left, top, width, height = map(float, word["bbox"])
            flat = [left, top, left + width, top + height]
        xs, ys = flat[::2], flat[1::2]
        return Word(text=_transcription(word), left=min(xs), top=min(ys), bottom=max(ys))
    except (KeyError, TypeError, ValueError) as error:
        shown = json.dumps(word, ensure_ascii=False)[:80]
        raise RecordError(
            "no box", f"the word {shown} must have points, or a bbox of four numbers"
        ) from error


@dataclass(frozen=True)
class LabelLine:
    """A line of PaddleOCR's label file."""

    span: Span

    def __str__(self) -> str:
        return f"line {self.span.number}"

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """The line as a record. Raises RecordError."""
        name, _, words = self.span.read_bytes(path, max_bytes).partition(b"\t")
        try:
            return {"image": name.decode(), "words": json.loads(words)}
        except (ValueError, RecursionError) as error:
            raise RecordError(
                "invalid JSON", f"after a name and a tab, a list of words is needed: {error}"
            ) from error


@dataclass(frozen=True)
class Truth:
    """A .txt file of ICDAR."""

    name: str

    def __str__(self) -> str:
        return self.name

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """The file of the folder `path` as a record without an image. Raises RecordError."""
        try:
            lines = read_file(path / self.name, max_bytes).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise RecordError("no text", f"no UTF-8: {error}") from error
        return {"words": [_parse_truth(number, line) for number, line in enumerate(lines, 1) if line.strip()]}


def _parse_truth(number: int, line: str) -> dict[str, Any]:
    match = CORNERS.fullmatch(line)
    if match is None:
        raise RecordError("no box", f"line {number} is {line[:80]!r}; x1,y1,x2,y2,x3,y3,x4,y4,TEXT is needed")
    first, comma, rest = match[2].partition(",")
    has_column = comma and (first in SCRIPTS or (first in ("0", "1") and rest.startswith('"')))
    text = (rest if has_column else match[2]).strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    corners = [float(corner) for corner in match[1].split(",") if corner.strip()]
    return {"transcription": text[1:-1] if is_quoted else text, "points": corners}


def _locate_in_object(path: Path, field: str, max_bytes: int) -> Sequence[Place]:
    locate = locate_images if has_lists(path, max_bytes) else locate_entries
    return locate(path, field, max_bytes)


RECORDS = records_format(read_scene_text, locate_in_object=_locate_in_object)


def _truths(material: Material) -> list[str]:
    return names_in(material.file, [TRUTH_SUFFIX]) if material.file.is_dir() else []


def _drafts(material: Material, field: str) -> Sequence[Draft]:
    if material.file.suffix == TRUTH_SUFFIX:
        return ItemDrafts(locate_lines(material.file, field), LabelLine)
    if names := _truths(material):
        return ItemDrafts(names, Truth)
    return RECORDS.drafts(material, field)


def _read(material: Material, draft: Draft) -> Sequence[RawSample]:
    if not isinstance(draft.place, Truth):
        return read_draft(material, draft, read_scene_text)
    record = draft.read(material.file, material.max_sample_bytes)
    image = next(_images_of(draft.place.name, material.image_folder), None)
    if image is None:
        raise RecordError("missing image", f"{material.image_folder} has none of its name")
    return [read_scene_text({**record, "image": image}, "")]


def _images_of(truth: str, folder: Path) -> Iterator[str]:
    stem = PurePosixPath(truth).with_suffix("")
    for name in (stem.name, stem.name.removeprefix(TRUTH_PREFIX)):
        for extension in IMAGE_FORMATS:
            image = str(stem.with_name(f"{name}.{extension}"))
            if (folder / image).is_file():
                yield image


def _digest(material: Material) -> str:
    if _truths(material):
        return files_digest(material.file, [TRUTH_SUFFIX])
    return records_digest(material)


FORMAT = Format(drafts=_drafts, read=_read, digest=_digest)
