"""Font files: which characters they have, how wide those are, and which font draws which of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from fontTools.ttLib import TTCollection, TTFont, TTLibError

from data_tools.raw.files import files_digest
from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_table import file_sha256

INSTALLED = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
)  # matplotlib's
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
BOLD_FROM = 600  # OS/2's usWeightClass
FULL_NAME, FAMILY_NAME, TYPOGRAPHIC_FAMILY = 4, 1, 16  # OpenType's "name" table
ENOUGH = 0.99  # of a text's characters, for a family to be one that can draw it


class Face:
    """One font of a file. Widths are in ems, so a font size times them is a width."""

    def __init__(self, path: Path, number: int, font: TTFont) -> None:
        self.path, self.number, self._font = path, number, font
        names = font["name"]
        self.name = str(names.getDebugName(FULL_NAME) or path.stem)
        self.family = str(
            names.getDebugName(TYPOGRAPHIC_FAMILY) or names.getDebugName(FAMILY_NAME) or self.name
        )
        self.is_bold = font["OS/2"].usWeightClass >= BOLD_FROM
        self.is_mono = bool(font["post"].isFixedPitch) or "Mono" in self.family
        self._units_per_em = font["head"].unitsPerEm
        self._glyphs: dict[int, str] = font.getBestCmap() or {}
        self._widths: dict[str, float] = {}

    def has(self, character: str) -> bool:
        return ord(character) in self._glyphs

    def width(self, character: str) -> float:
        """Raises KeyError for a character that the font lacks."""
        width = self._widths.get(character)
        if width is None:
            advance: int = self._font["hmtx"][self._glyphs[ord(character)]][0]
            width = self._widths[character] = advance / self._units_per_em
        return width


@dataclass(frozen=True, kw_only=True)
class Family:
    """A regular face, and the bold one where there is one."""

    name: str
    regular: Face
    bold: Face | None
    is_mono: bool

    def face(self, is_bold: bool) -> Face:
        return self.bold if is_bold and self.bold is not None else self.regular


class Fonts:
    """All configured families, in their order: the first that has a character draws it where a chosen one has not."""

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = families

    def candidates(self, text: str, *, is_mono: bool) -> list[Family]:
        """The families that can draw ENOUGH of `text`, else those that can draw the most of it; at least one."""
        kind = [family for family in self.families if family.is_mono == is_mono] or list(self.families)
        characters = [character for character in text if not character.isspace()]
        covered = [sum(map(family.regular.has, characters)) for family in kind]
        least = min(ENOUGH * len(characters), max(covered))
        return [family for family, count in zip(kind, covered, strict=True) if count >= least]

    def face_for(self, character: str, family: Family, *, is_bold: bool) -> Face | None:
        """The face that draws `character` in a text of `family`; None where no font has it."""
        if family.face(is_bold).has(character):
            return family.face(is_bold)
        faces = (other.face(is_bold) for other in self.families)
        return next((face for face in faces if face.has(character)), None)


@cache
def load_fonts(paths: tuple[str, ...], field: str) -> Fonts:
    """The families of font files and folders of them; DejaVu, which comes with matplotlib, where `paths` is empty.

    `PATH#WORD` takes only faces whose full names have that word (`NotoSansCJK-Regular.ttc#SC`). Italic faces are
    left out. Raises UserError, naming `field`, for a path that holds no such font.
    """
    installed = Path(matplotlib.get_data_path()) / "fonts/ttf"
    paths = paths or tuple(str(installed / f"{name}.ttf") for name in INSTALLED)
    faces: dict[tuple[str, bool], Face] = {}
    for path in paths:
        found = list(_faces(path, field))
        if not any(not face.is_bold for face in found) and not any(
            face.family == f for face in found for f, _ in faces
        ):
            raise UserError(f"{field} has {path}, which holds no regular font ({', '.join(SUFFIXES)})")
        for face in found:
            faces.setdefault((face.family, face.is_bold), face)
    return Fonts(
        [
            Family(name=name, regular=face, bold=faces.get((name, True)), is_mono=face.is_mono)
            for (name, is_bold), face in faces.items()
            if not is_bold
        ]
    )


def fonts_digest(path: str) -> str:
    """Differs where the font files of an entry of `load_fonts` do; nothing for one that is not there."""
    root = Path(path.partition("#")[0])
    return file_sha256(root) if root.is_file() else files_digest(root, SUFFIXES)


def _faces(path: str, field: str) -> Iterator[Face]:
    place, _, word = path.partition("#")
    root = Path(place)
    if not root.exists():
        raise UserError(f"{field} has {path}: there is no {root}")
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    for file in files:
        if file.suffix.lower() in SUFFIXES or root.is_file():
            for number, font in enumerate(_open(file, field)):
                face = Face(file, number, font)
                if not _is_slanted(font) and (not word or word in face.name.split()):
                    yield face


def _open(file: Path, field: str) -> list[Any]:
    try:
        if file.suffix.lower() in (".ttc", ".otc"):
            return list(TTCollection(str(file), lazy=True).fonts)
        return [TTFont(str(file), lazy=True)]
    except (TTLibError, OSError) as error:
        raise UserError(f"{field} has {file}, which is no font: {error}") from error


def _is_slanted(font: TTFont) -> bool:
    return bool(font["post"].italicAngle)
