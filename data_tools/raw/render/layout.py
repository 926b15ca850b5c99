"""Blocks laid out on pages: what stands where, and the text of each page."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_tools.raw.format import RecordError
from data_tools.raw.render.blocks import FORMULA, Block
from data_tools.raw.render.fonts import Face, Family, Fonts
from data_tools.raw.render.formula import Picture, draw_formula
from data_tools.raw.render.lines import break_lines
from data_tools.raw.render.template import Colour, Template

HEADING_SIZES = {1: 1.8, 2: 1.5, 3: 1.25, 4: 1.1}  # over the text's size
CODE_SIZE, CODE_LEADING = 0.9, 1.3
ITEM_INDENT, MAX_ITEM_LEVEL = 1.4, 4  # an item's indent by level, over the text's size
SPACING = {"heading": 0.9, "paragraph": 0.6, "item": 0.2, "row": 0.25, "code": 0.6}  # above a block, in sizes
ASCENT = 0.9  # of the size: from the top of a line to its baseline, without the leading
JOINED = {"item": "\n", "row": "\n"}  # between two blocks of that kind; others are a line apart
UNSHAPED = {"R", "AL", "AN"}  # bidirectional classes of what is written from right to left


@dataclass(frozen=True, kw_only=True)
class Run:
    """Characters in one font, or a formula. `x` is the left end and `y` the baseline, from the page's upper left."""

    x: float
    y: float
    width: float
    content: str | Picture
    face: Face | None
    size: float
    ink: Colour


@dataclass(kw_only=True)
class Page:
    """`problem` says what on it cannot be drawn; then it is no page to show."""

    runs: list[Run] = field(default_factory=list)
    text: str = ""
    problem: RecordError | None = None


@dataclass(frozen=True, kw_only=True)
class _Style:
    family: Family
    is_bold: bool
    size: float
    leading: float
    ink: Colour
    indent: float = 0.0  # of all lines
    first_indent: float = 0.0  # of the first, on top; negative where the others hang


@dataclass(frozen=True, kw_only=True, slots=True)
class _Glyph:
    """A character, or a formula's picture, as it is drawn; `problem` where it cannot be."""

    content: str | Picture
    face: Face | None
    width: float
    problem: RecordError | None = None


def lay_out(blocks: Sequence[Block], template: Template, fonts: Fonts) -> Iterator[Page]:
    """The pages of a document, one at a time. The text of a page is that of its lines, in reading order; formulas
    are LaTeX between dollar signs. What cannot be drawn takes some space, and is its page's problem.
    """
    flow = _Flow(template)
    previous = ""
    for block in blocks:
        style = _style(block, template)
        glyphs = _glyphs(block, style, fonts)
        yield from flow.add(
            block, style, glyphs, JOINED.get(block.kind, "\n\n") if block.kind == previous else "\n\n"
        )
        previous = block.kind
    if flow.page.text:
        yield flow.page


def _style(block: Block, template: Template) -> _Style:
    size = template.size
    if block.kind == "heading":
        size *= HEADING_SIZES.get(block.level, 1.0)
        return _Style(
            family=template.headings, is_bold=True, size=size, leading=1.25, ink=template.heading_ink
        )
    if block.kind == "code":
        return _Style(
            family=template.code, is_bold=False, size=CODE_SIZE * size, leading=CODE_LEADING, ink=template.ink
        )
    indent, first_indent = 0.0, template.indent if block.kind == "paragraph" else 0.0
    if block.kind == "item":
        indent, first_indent = ITEM_INDENT * size * min(block.level, MAX_ITEM_LEVEL), -size
    return _Style(
        family=template.body,
        is_bold=False,
        size=size,
        leading=template.leading,
        ink=template.ink,
        indent=indent,
        first_indent=first_indent,
    )


def _glyphs(block: Block, style: _Style, fonts: Fonts) -> list[_Glyph]:
    formulas = iter(block.formulas)
    return [
        _formula(next(formulas), style) if character == FORMULA else _glyph(character, style, fonts)
        for character in block.text
    ]


def _glyph(character: str, style: _Style, fonts: Fonts) -> _Glyph:
    if character == "\n":
        return _Glyph(content=character, face=None, width=0.0)
    face = fonts.face_for(character, style.family, is_bold=style.is_bold)
    problem = None
    if face is None or character == "�":
        detail = f"no font of raw.fonts has {character!r} (U+{ord(character):04X})"
        problem = RecordError("no glyph", detail)
    elif unicodedata.bidirectional(character) in UNSHAPED or unicodedata.combining(character):
        name = unicodedata.name(character, "")
        problem = RecordError("needs shaping", f"{character!r} (U+{ord(character):04X}, {name})")
    width = face.width(character) if face is not None else 0.5
    return _Glyph(content=character, face=face, width=width * style.size, problem=problem)


def _formula(source: str, style: _Style) -> _Glyph:
    try:
        picture = draw_formula(source, style.size, style.ink)
    except RecordError as error:
        return _Glyph(content="", face=None, width=style.size, problem=error)
    return _Glyph(content=picture, face=None, width=picture.width)


class _Flow:
    """Fills columns and pages with lines. `page` is the one that is being filled."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.page = Page()
        self._column, self._top = 0, template.margin

    def add(self, block: Block, style: _Style, glyphs: list[_Glyph], separator: str) -> Iterator[Page]:
        """Place a block; the pages that this fills."""
        if not self._is_at_top:
            self._top += SPACING[block.kind] * self._template.size
        formulas = iter(block.formulas)
        shown = [f"${next(formulas)}$" if character == FORMULA else character for character in block.text]
        last_end: int | None = None  # of the block's line before, on this page
        width = self._template.column_width - style.indent
        for number, (start, end) in enumerate(self._lines(block.text, style, glyphs, width)):
            line = glyphs[start:end]
            height, ascent = _extent(line, style)
            needed = height if number or block.kind != "heading" else height + 2 * self._template.size
            if self._top + needed > self._bottom and not self._is_at_top and self._next_column():
                yield self.page
                self.page, last_end = Page(), None
            indent = style.indent + (0.0 if number else style.first_indent)
            self._place(line, style, self._left + indent, self._top + ascent)
            self._top += height
            if last_end is None:
                self.page.text += separator if self.page.text else ""
            else:
                self.page.text += "".join(shown[last_end:start])
            self.page.text += "".join(shown[start:end])
            last_end = end

    def _lines(self, text: str, style: _Style, glyphs: list[_Glyph], width: float) -> list[tuple[int, int]]:
        """A first line's indent is room that its first character takes."""
        widths = [glyph.width for glyph in glyphs]
        widths[0] += style.first_indent
        return break_lines(text, widths, width)

    @property
    def _left(self) -> float:
        template = self._template
        return template.margin + self._column * (template.column_width + template.gutter)

    @property
    def _bottom(self) -> float:
        return self._template.height - self._template.margin

    @property
    def _is_at_top(self) -> bool:
        return self._top == self._template.margin

    def _next_column(self) -> bool:
        """Go to the top of the next column; whether it is on another page."""
        self._column = (self._column + 1) % self._template.num_columns
        self._top = self._template.margin
        return self._column == 0

    def _place(self, line: list[_Glyph], style: _Style, x: float, y: float) -> None:
        """Neighbours of one font are one run."""
        begin, count = x, 0
        for number, glyph in enumerate(line):
            self.page.problem = self.page.problem or glyph.problem
            x += glyph.width
            count += 1
            following = line[number + 1] if number + 1 < len(line) else None
            if following is not None and isinstance(glyph.content, str) and following.face is glyph.face:
                continue
            pieces = [glyph.content for glyph in line[number + 1 - count : number + 1]]
            content = pieces[0] if isinstance(pieces[0], Picture) else "".join(map(str, pieces))
            self.page.runs.append(
                Run(
                    x=begin,
                    y=y,
                    width=x - begin,
                    content=content,
                    face=glyph.face,
                    size=style.size,
                    ink=style.ink,
                )
            )
            begin, count = x, 0


def _extent(line: list[_Glyph], style: _Style) -> tuple[float, float]:
    """Height of a line and its ascent: more than the font's where a formula is higher."""
    pictures = [glyph.content for glyph in line if isinstance(glyph.content, Picture)]
    lead = (style.leading - 1) * style.size / 2
    ascent = max([ASCENT * style.size, *(picture.height - picture.depth for picture in pictures)])
    descent = max([(1 - ASCENT) * style.size + 0.15 * style.size, *(picture.depth for picture in pictures)])
    return lead + ascent + descent + lead, lead + ascent
