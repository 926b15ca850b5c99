"""A page's text is what the page shows, by the word of a PDF reader; what cannot be shown is told."""

import io
import itertools
import re
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
import pytest
from fpdf import FPDF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.raw.format import RawSample, RecordError
from data_tools.raw.render.blocks import Block
from data_tools.raw.render.document import FORMAT
from data_tools.raw.render.draw import draw_pages, open_pdf
from data_tools.raw.render.fonts import Fonts, load_fonts
from data_tools.raw.render.layout import Page, lay_out
from data_tools.raw.render.template import Template, draw_template
from megatron_vl.config.errors import UserError
from tests.support.documents import material, write_font

HANZI = "的一是在不了有和人这中大为上个国我以要他时来用们，。（）“”："
LATIN = "the quick brown fox, jumps (over) lazy dogs. "
TEXTS = st.text(st.sampled_from(HANZI + LATIN), min_size=1, max_size=400).filter(str.strip)
BLOCKS = st.lists(
    st.builds(
        Block,
        kind=st.sampled_from(["heading", "paragraph", "item", "row", "code"]),
        text=TEXTS.map(lambda text: re.sub(r"\s+", " ", text).strip()),
        level=st.integers(1, 6),
    ),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Fonts:
    """DejaVu, and a font with the Chinese characters above."""
    path = write_font(tmp_path_factory.mktemp("fonts") / "boxes.ttf", HANZI)
    installed = [str(family.regular.path) for family in load_fonts((), "fonts").families]
    return load_fonts((*installed, str(path)), "fonts")


def squeezed(text: str) -> str:
    """Without white space; a hyphen at a line's end is a mark of the PDF reader's own."""
    return re.sub(r"\s", "", text.replace("\ufffe", "-").replace("\x02", "-"))


def assert_within_margins(page: Page, template: Template) -> None:
    """Of the page and of its columns; any character is narrower than a column."""
    for run in page.runs:
        assert run.x > template.margin - 1e-3
        offset = (run.x - template.margin + 1e-3) % (template.column_width + template.gutter)
        assert offset + run.width < template.column_width + 2e-3
        assert template.margin < run.y < template.height - template.margin


def in_reading_order(page: pdfium.PdfPage, template: Template) -> str:
    """A page's characters by where they stand: column, then line, then from left to right."""
    text = page.get_textpage()
    placed = []
    for number in range(text.count_chars()):
        character = text.get_text_range(number, 1)
        if character.isspace():
            continue
        left, bottom, right, top = text.get_charbox(number, loose=True)
        assert 0 <= left < right <= template.width and 0 <= bottom < top <= template.height
        column = int((left - template.margin + template.size / 2) / (template.column_width + template.gutter))
        placed.append((column, -(bottom + top) / 2, left, character))
    lines: list[list[tuple[float, str]]] = []
    last: tuple[int, float] | None = None
    for column, height, left, character in sorted(placed):
        if last is None or column != last[0] or height - last[1] > template.size / 2:
            lines.append([])
            last = column, height
        lines[-1].append((left, character))
    return "".join(character for line in lines for _, character in sorted(line))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BLOCKS, st.integers(0, 1000))
def test_the_text_of_a_page_is_what_stands_on_it(fonts: Fonts, blocks: list[Block], name: int) -> None:
    pages, _ = drawn_as_told(blocks, str(name), fonts)
    assert pages


def test_the_text_of_many_pages_is_what_stands_on_them(fonts: Fonts) -> None:
    """Templates of one column and of two, each with more text than two pages hold."""
    kinds = itertools.cycle(["paragraph", "heading", "code", "item", "paragraph", "row"])
    blocks = [Block(kind=next(kinds), text=f"{n} {LATIN}{HANZI}{LATIN}" * 4, level=2) for n in range(60)]
    columns = set()
    for name in range(6):
        pages, template = drawn_as_told(blocks, str(name), fonts)
        assert len(pages) > 2
        columns.add(template.num_columns)
    assert columns == {1, 2}


def drawn_as_told(blocks: list[Block], name: str, fonts: Fonts) -> tuple[list[Page], Template]:
    """The pages of a document, each compared with the PDF of them."""
    template = draw_template(name, "".join(block.text for block in blocks), fonts)
    pages = list(lay_out(blocks, template, fonts))
    assert all(page.problem is None for page in pages)
    document = open_pdf(draw_pages(pages, template))
    assert len(document) == len(pages)
    for page, drawn in zip(pages, document, strict=True):
        assert_within_margins(page, template)
        assert squeezed(drawn.get_textpage().get_text_range()) == squeezed(page.text)
        assert squeezed(in_reading_order(drawn, template)) == squeezed(page.text)
    whole = "".join(page.text for page in pages)
    assert squeezed(whole) == squeezed("".join(block.text for block in blocks))
    return pages, template


def read(folder: Path, name: str, **raw: Any) -> list[RawSample | RecordError]:
    of = material(folder, **raw)
    assert name in FORMAT.drafts(of, "raw.file")
    return list(FORMAT.read(of, name))


def test_a_document_becomes_pages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n} of the document. " * 12 for n in range(40)]
    (tmp_path / "a.html").write_text("<h1>Title</h1>" + "".join(f"<p>{text}</p>" for text in paragraphs))
    samples = read(tmp_path, "a.html")
    assert len(samples) > 1
    texts = []
    for sample in samples:
        assert isinstance(sample, RawSample) and sample.fields["text"].startswith("<image>")
        with Image.open(io.BytesIO(sample.images[0])) as image:
            assert max(image.size) == 1024
            assert len(image.convert("L").getcolors()) > 10  # letters, not a blank sheet
        texts.append(sample.fields["text"].removeprefix("<image>"))
    assert " ".join(texts).split() == ["Title", *"".join(paragraphs).split()]
    again = read(tmp_path, "a.html")
    assert [sample.images for sample in again] == [sample.images for sample in samples]


def test_names_give_different_looks(fonts: Fonts) -> None:
    templates = [draw_template(f"{n}.html", "text", fonts) for n in range(200)]
    assert templates[:5] == [draw_template(f"{n}.html", "text", fonts) for n in range(5)]
    assert len({(t.width, t.size, t.num_columns, t.body.name, t.paper, t.margin) for t in templates}) > 50


def test_what_no_font_has_is_told_and_the_other_pages_stay(tmp_path: Path) -> None:
    text = "<p>" + "</p><p>".join(["An English paragraph. " * 30] * 20)
    (tmp_path / "a.html").write_text(f"{text}</p><p>汉字</p>")
    *pages, last = read(tmp_path, "a.html")
    assert (
        isinstance(last, RecordError) and last.cause == "no glyph" and last.name == f"page {len(pages) + 1}"
    )
    assert "'汉' (U+6C49)" in last.detail
    assert pages and all(isinstance(page, RawSample) for page in pages)
    font = write_font(tmp_path / "hanzi.ttf", "汉字")
    installed = [str(family.regular.path) for family in load_fonts((), "fonts").families]
    samples = read(tmp_path, "a.html", fonts=[*installed, str(font)])
    assert all(isinstance(page, RawSample) for page in samples)


@pytest.mark.parametrize("text", ["שלום", "مرحبا", "x\u0335"])
def test_scripts_that_need_shaping_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<p>{text}</p>")
    (page,) = read(tmp_path, "a.html")
    assert isinstance(page, RecordError) and page.cause == "needs shaping"


def test_formulas_are_drawn_and_stay_latex(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(r"We have $\frac{a}{b} \le 1$ here.")
    (page,) = read(tmp_path, "a.md")
    assert isinstance(page, RawSample)
    assert page.fields["text"] == r"<image>We have $\frac{a}{b} \le 1$ here."
    (tmp_path / "b.md").write_text(r"We have $\begin{matrix} a \end{matrix}$ here.")
    (page,) = read(tmp_path, "b.md")
    assert isinstance(page, RecordError) and page.cause == "formula not drawn"
    assert r"\begin{matrix}" in page.detail


def test_a_formula_takes_its_room(fonts: Fonts) -> None:
    """It covers neither the words around it nor other lines: the ink of a page is that of its parts."""
    template = draw_template("0", "text", fonts)
    runs = [
        run
        for page in lay_out(
            [Block(kind="paragraph", text="word \ufffc word " * 30, formulas=[r"\sum_{i=1}^{n} i^2"] * 30)],
            template,
            fonts,
        )
        for run in page.runs
    ]
    lines: dict[float, list[Any]] = {}
    for run in runs:
        lines.setdefault(run.y, []).append(run)
    for line in lines.values():
        for left, right in itertools.pairwise(line):
            assert left.x + left.width <= right.x + 1e-6
    heights = sorted(lines)
    tallest = max(run.content.height for run in runs if not isinstance(run.content, str))
    assert min(below - above for above, below in itertools.pairwise(heights)) >= tallest


def given_pdf(path: Path, *, password: str = "") -> None:
    """Two pages: one of text, one of an image alone."""
    pdf = FPDF()
    pdf.add_page()
    pdf.set_font("helvetica", size=14)
    pdf.text(30, 30, "First line of it.")
    pdf.text(30, 40, "Second line of a well-")
    pdf.text(30, 46, "known text.")
    pdf.add_page()
    pdf.image(Image.new("RGB", (30, 30), "red"), 10, 10)
    if password:
        pdf.set_encryption(owner_password="owner", user_password=password)
    path.write_bytes(bytes(pdf.output()))


def test_pages_of_a_given_pdf(tmp_path: Path) -> None:
    given_pdf(tmp_path / "a.pdf")
    text, scan = read(tmp_path, "a.pdf")
    assert isinstance(text, RawSample)
    assert text.fields["text"] == "<image>First line of it.\nSecond line of a well-known text."
    with Image.open(io.BytesIO(text.images[0])) as image:
        assert max(image.size) == 1024
    assert isinstance(scan, RecordError) and (scan.cause, scan.name) == ("no text", "page 2")


@pytest.mark.parametrize("data", [b"", b"no PDF", b"%PDF-1.7 cut off"])
def test_a_pdf_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(data)
    with pytest.raises(RecordError, match="PDF cannot be opened"):
        read(tmp_path, "a.pdf")


def test_a_pdf_with_a_password(tmp_path: Path) -> None:
    given_pdf(tmp_path / "a.pdf", password="secret")
    with pytest.raises(RecordError, match="PDF cannot be opened"):
        read(tmp_path, "a.pdf")


def test_a_paragraph_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>" + "x" * 300_000)
    with pytest.raises(RecordError, match="a paragraph has 300000 characters"):
        read(tmp_path, "a.html")


@pytest.mark.parametrize("text", ["", "<p> </p>", "<nav>menu</nav>"])
def test_a_document_without_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<html><body>{text}</body></html>")
    with pytest.raises(RecordError, match="no text"):
        read(tmp_path, "a.html")


def test_an_image_mark_in_the_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>write &lt;image&gt; there</p>")
    (page,) = read(tmp_path, "a.html")
    assert isinstance(page, RecordError) and page.cause == "images do not match the marks"


def test_fonts_are_checked_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>text</p>")
    (tmp_path / "no.ttf").write_bytes(b"no font")
    (tmp_path / "empty").mkdir()
    font = write_font(tmp_path / "boxes.ttf", "abc", family="Some Boxes")
    for path, words in (
        (tmp_path / "missing.ttf", "there is no"),
        (tmp_path / "no.ttf", "is no font"),
        (tmp_path / "empty", "holds no regular font"),
        (f"{font}#Other", "holds no regular font"),
    ):
        with pytest.raises(UserError, match=rf"raw\.fonts has .*{words}"):
            FORMAT.drafts(material(tmp_path, fonts=[str(path)]), "raw.file")
    assert [family.name for family in load_fonts((f"{font}#Boxes",), "fonts").families] == ["Some Boxes"]


def test_what_a_build_is_made_of(tmp_path: Path) -> None:
    """Another text, font or document is another build; a link is no document."""
    (tmp_path / "a.md").write_text("text")
    digests = {FORMAT.digest(material(tmp_path))}
    (tmp_path / "a.md").write_text("other")
    digests.add(FORMAT.digest(material(tmp_path)))
    font = write_font(tmp_path / "boxes.ttf", "abc")
    digests.add(FORMAT.digest(material(tmp_path, fonts=[str(font)])))
    write_font(font, "abcd")
    digests.add(FORMAT.digest(material(tmp_path, fonts=[str(font)])))
    assert len(digests) == 4
    (tmp_path / "link.md").symlink_to(tmp_path / "a.md")
    assert FORMAT.drafts(material(tmp_path), "raw.file") == ["a.md"]
