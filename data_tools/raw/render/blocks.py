"""What a document consists of, as far as a page shows it: headings, paragraphs, list items, rows and code."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

import lxml.html
from lxml import etree

from data_tools.raw.navigation import is_navigation

FORMULA = "￼"  # U+FFFC, the object replacement character, stands for a formula in a block's text
HEADINGS = {f"h{level}": level for level in range(1, 7)}
SKIPPED = {
    *("script", "style", "nav", "header", "footer", "form", "head", "noscript", "template"),
    *("svg", "iframe", "button", "select", "textarea", "object", "video", "audio", "canvas"),
    *("math", "annotation"),
}
BLOCKS = {
    *("p", "div", "section", "article", "main", "body", "blockquote", "ul", "ol", "dl", "li"),
    *("dt", "dd", "table", "thead", "tbody", "tfoot", "tr", "caption", "figure", "figcaption"),
    *("pre", "hr", "address", "center", "details", "summary", "aside", "html", "fieldset"),
    *HEADINGS,
}
WIDE = "[\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff60]"
LINE_BREAK = re.compile(rf"(?<={WIDE})[ \t]*\n\s*(?={WIDE})")
# Soft hyphens, and marks of width and direction.
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
MAX_DEPTH = 100  # of nested elements


@dataclass(kw_only=True)
class Block:
    """One kind of text. `kind`: heading, paragraph, item, row or code; `level` is a heading's (1 to 6) or an item's.

    Every FORMULA in `text` stands for one of `formulas`, LaTeX without delimiters, in their order.
    """

    kind: str
    text: str
    level: int = 0
    formulas: list[str] = field(default_factory=list)


def read_html(data: str | bytes) -> list[Block]:
    """The blocks of a page's main content: `main` or `article` where there is one, without navigation and scripts.

    Characters are composed (NFC); white space is single spaces, except in code. Bytes that are UTF-8 are read as that,
    others as they declare. Raises ValueError for what is no HTML.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        parser = lxml.html.HTMLParser(encoding="utf-8" if _is_utf8(data) else None)
        tree = lxml.html.document_fromstring(data, parser=parser)
    except etree.ParserError as error:
        raise ValueError(str(error)) from error
    reader = _Reader()
    reader.read(_main(tree), 0)
    reader.end()
    return reader.blocks


def _main(tree: lxml.html.HtmlElement) -> lxml.html.HtmlElement:
    found = tree.xpath("//main | //*[@role='main'] | //article")
    return found[0] if len(found) == 1 else tree.find("body") if tree.find("body") is not None else tree


class _Reader:
    """Walks a tree and gathers text until an element begins or ends a block."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._pieces: list[str] = []
        self._formulas: list[str] = []
        self._kind, self._level = "paragraph", 0
        self._lists: list[int | None] = []  # the next number of each ordered list around, None for the others
        self._marker = ""

    def read(self, element: lxml.html.HtmlElement, depth: int) -> None:
        if not isinstance(element.tag, str) or _is_skipped(element):
            return
        if depth > MAX_DEPTH:
            raise ValueError(f"elements are nested more than {MAX_DEPTH} deep")
        tag, classes = element.tag, (element.get("class") or "").split()
        if "math" in classes and tag == "span":
            self._formula(element.text_content())
        elif tag == "pre":
            self._code(element)
        elif tag == "tr":
            self._row(element, depth)
        elif tag == "br":
            self._pieces.append(" ")
        elif tag in BLOCKS:
            self._block(element, depth)
        else:
            self._children(element, depth)

    def read_inside(self, element: lxml.html.HtmlElement, depth: int) -> None:
        self._children(element, depth)
        self.end()

    def end(self) -> None:
        """What was gathered is a block."""
        text = _clean("".join(self._pieces))
        if text:
            formulas = self._formulas
            self.blocks.append(
                Block(kind=self._kind, text=self._marker + text, level=self._level, formulas=formulas)
            )
            self._marker = ""
        self._pieces, self._formulas = [], []

    def _children(self, element: lxml.html.HtmlElement, depth: int) -> None:
        self._pieces.append(_without_marks(element.text))
        for child in element:
            self.read(child, depth + 1)
            self._pieces.append(_without_marks(child.tail))

    def _block(self, element: lxml.html.HtmlElement, depth: int) -> None:
        self.end()
        before = self._kind, self._level
        tag = element.tag
        if tag in HEADINGS:
            self._kind, self._level = "heading", HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._kind, self._level, self._marker = "item", max(len(self._lists), 1), self._next_marker()
        self.read_inside(element, depth)
        if tag in ("ul", "ol"):
            self._lists.pop()
        if tag == "li":
            self._marker = ""
        self._kind, self._level = before

    def _next_marker(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "• "
        number = self._lists[-1]
        self._lists[-1] = number + 1
        return f"{number}. "

    def _formula(self, text: str) -> None:
        self._pieces.append(FORMULA)
        self._formulas.append(
            text.strip().removeprefix("\\(").removeprefix("\\[").removesuffix("\\)").removesuffix("\\]")
        )

    def _code(self, element: lxml.html.HtmlElement) -> None:
        self.end()
        text = unicodedata.normalize("NFC", _without_marks(element.text_content()))
        text = INVISIBLE.sub("", text).expandtabs(4)
        lines = [line.rstrip() for line in text.splitlines()]
        text = "\n".join(lines).strip("\n")
        if text:
            self.blocks.append(Block(kind="code", text=text))

    def _row(self, element: lxml.html.HtmlElement, depth: int) -> None:
        """A row of a table is one line, its cells between bars. A row of one cell is what stands in that cell."""
        self.end()
        cells = [_blocks_inside(cell, depth + 1) for cell in element.iterchildren("td", "th")]
        filled = [blocks for blocks in cells if blocks]
        if len(filled) == 1:
            self.blocks += filled[0]
        elif filled:
            texts = [" ".join(block.text.replace("\n", " ") for block in blocks) for blocks in cells]
            formulas = [formula for blocks in cells for block in blocks for formula in block.formulas]
            self.blocks.append(Block(kind="row", text=" | ".join(texts).strip(), formulas=formulas))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
        return True
    except UnicodeDecodeError:
        return False


def _blocks_inside(element: lxml.html.HtmlElement, depth: int) -> list[Block]:
    reader = _Reader()
    reader.read_inside(element, depth)
    return reader.blocks


def _is_skipped(element: lxml.html.HtmlElement) -> bool:
    return (
        element.tag in SKIPPED
        or is_navigation((element.get("class") or "").split(), element.get("role"))
        or element.get("hidden") is not None
    )


def _without_marks(text: str | None) -> str:
    """A document's own object replacement characters are none of ours."""
    return (text or "").replace(FORMULA, "�")


def _clean(text: str) -> str:
    """A line break between two Chinese characters is none of the text's (CSS Text, section 4.1.2)."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return re.sub(r"\s+", " ", LINE_BREAK.sub("", text)).strip()


def whole_text(blocks: Iterable[Block]) -> str:
    return "\n".join(block.text for block in blocks)
