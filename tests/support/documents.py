"""Documents to be rendered, and what they are rendered with."""

from pathlib import Path
from typing import Any

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from data_tools.raw.format import Material
from megatron_vl.config.data import RawConfig


def material(folder: Path, **values: Any) -> Material:
    """A multimodal source of `folder`; `values` are those of `raw`."""
    return Material(
        source="mine",
        raw=RawConfig(**{"file": str(folder), **values}),
        image_folder=folder,
        modality="multimodal",
        has_heldout=False,
        max_sample_bytes=10_000_000,
        max_image_pixels=10_000_000,
    )


def write_font(path: Path, characters: str, family: str = "Boxes") -> Path:
    """A font whose glyph for each of `characters` is a box of its own height, an em wide."""
    names = {character: f"u{ord(character):04X}" for character in sorted(set(characters))}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    builder.setupGlyf(
        {name: _box(200 + 500 * n // len(names)) for n, name in enumerate([".notdef", *names.values()])}
    )
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(
        {"familyName": family, "styleName": "Regular", "fullName": family, "psName": family}
    )
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return path


def _box(height: int) -> Any:
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, height), (900, height), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()
