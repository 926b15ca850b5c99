"""How a document looks: drawn from its name, so the same every time and different from others."""

import hashlib
import random
from dataclasses import dataclass

from data_tools.raw.render.fonts import Family, Fonts

Colour = tuple[int, int, int]
POINTS = 1024  # of a page's long side; one is a pixel of the image, and of SAM's input
SHAPES = (0.707, 0.773, 0.75, 1.0, 1.333)  # width over height: A4, letter, a tablet's, square, a slide's
# Paper, ink and headings.
COLOURS: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((255, 255, 255), (0, 0, 0), (0, 0, 0)),
    ((255, 255, 255), (40, 40, 40), (150, 20, 30)),
    ((252, 249, 240), (50, 40, 30), (30, 70, 110)),
    ((244, 246, 248), (30, 34, 40), (0, 90, 70)),
    ((255, 255, 255), (20, 20, 20), (20, 60, 140)),
    ((30, 32, 38), (225, 225, 220), (120, 190, 255)),
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """Lengths are in points."""

    width: int
    height: int
    margin: float
    num_columns: int
    gutter: float  # between columns
    size: float  # of the text
    leading: float  # from line to line, over the size
    indent: float  # of a paragraph's first line; without one, paragraphs are spaced apart
    body: Family
    headings: Family
    code: Family
    paper: Colour
    ink: Colour
    heading_ink: Colour

    @property
    def column_width(self) -> float:
        return (self.width - 2 * self.margin - self.gutter * (self.num_columns - 1)) / self.num_columns


def draw_template(name: str, text: str, fonts: Fonts) -> Template:
    """The template of the document `name`, in families that can draw its `text`."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    shape = generator.choice(SHAPES)
    width, height = (round(POINTS * shape), POINTS) if shape <= 1 else (POINTS, round(POINTS / shape))
    size = generator.choice((13.0, 14.5, 16.0, 18.0, 21.0))
    families = fonts.candidates(text, is_mono=False)
    body = generator.choice(families)
    paper, ink, heading_ink = generator.choice(COLOURS)
    return Template(
        width=width,
        height=height,
        margin=generator.choice((40.0, 56.0, 80.0)),
        num_columns=generator.choice((1, 1, 2)) if size < 18 else 1,
        gutter=2 * size,
        size=size,
        leading=generator.choice((1.35, 1.5, 1.7)),
        indent=generator.choice((0.0, 0.0, 2 * size)),
        body=body,
        headings=generator.choice((body, generator.choice(families))),
        code=generator.choice(fonts.candidates("", is_mono=True)),
        paper=paper,
        ink=ink,
        heading_ink=heading_ink,
    )
