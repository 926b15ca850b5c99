"""Pages as PDF, and PDF as images with their text."""

import io
import re
from collections.abc import Sequence

import pypdfium2 as pdfium
from fpdf import FPDF

from data_tools.raw.format import RecordError
from data_tools.raw.render.formula import Picture
from data_tools.raw.render.layout import Page
from data_tools.raw.render.template import POINTS, Template

BROKEN = re.compile(
    "[\x00-\x08\x0e-\x1f�\ue000-\uf8ff]"
)  # what a PDF gives for glyphs whose meaning it lacks
HYPHEN = re.compile("[\x02\ufffe]")  # pdfium's mark for a hyphen and the end of its line


def draw_pages(pages: Sequence[Page], template: Template) -> bytes:
    """A PDF file of pages without problems, a point for each pixel of their images."""
    pdf = FPDF(unit="pt", format=(template.width, template.height))
    pdf.set_compression(False)
    pdf.set_auto_page_break(False)
    for page in pages:
        pdf.add_page()
        pdf.set_fill_color(*template.paper)
        pdf.rect(0, 0, template.width, template.height, style="F")
        for run in page.runs:
            if isinstance(run.content, Picture):
                top = run.y - run.content.height + run.content.depth
                pdf.image(io.BytesIO(run.content.png), run.x, top, run.content.width, run.content.height)
            elif run.face is not None and run.content.strip():
                key = f"{run.face.name}-{run.face.number}"
                if key.lower() not in pdf.fonts:
                    pdf.add_font(key, fname=run.face.path, collection_font_number=run.face.number)
                pdf.set_font(key, size=run.size)
                pdf.set_text_color(*run.ink)
                pdf.text(run.x, run.y, run.content)
    return bytes(pdf.output())


def open_pdf(data: bytes) -> pdfium.PdfDocument:
    """Raises RecordError for what is no PDF, is damaged or needs a password."""
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise RecordError("PDF cannot be opened", str(error)) from error


def page_image(document: pdfium.PdfDocument, number: int) -> bytes:
    """A PNG file whose long side has POINTS pixels. Raises RecordError for a page that cannot be drawn."""
    try:
        page = document[number]
        long_side = max(page.get_size())
        if long_side <= 0:
            raise ValueError("it has no size")
        bitmap = page.render(scale=POINTS / long_side, rev_byteorder=True)
        picture = bitmap.to_pil().convert("RGB")
    except (pdfium.PdfiumError, ValueError) as error:
        raise RecordError("page cannot be drawn", str(error)) from error
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def page_text(document: pdfium.PdfDocument, number: int) -> str:
    """What a page of a given PDF says, in the PDF's own order.

    Raises RecordError for a page without text, such as a scanned one, or whose glyphs have no known meaning.
    """
    try:
        text = document[number].get_textpage().get_text_bounded()
    except pdfium.PdfiumError as error:
        raise RecordError("page cannot be read", str(error)) from error
    text = HYPHEN.sub("-", text)
    if broken := BROKEN.search(text):
        raise RecordError("glyphs without meaning", f"U+{ord(broken[0]):04X} at character {broken.start()}")
    lines = [line.rstrip() for line in text.splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    if not text:
        raise RecordError("no text", "the page has none: it may be scanned, or blank")
    return text
