"""The format document_pages: each document of a folder becomes page images with the text of each page.

.html, .md and .tex files are laid out by a template of the file's own; a .pdf file has its pages.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from data_tools.raw.fields import unmarked
from data_tools.raw.files import files_digest, list_files, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.render import pandoc
from data_tools.raw.render.blocks import Block, read_html, whole_text
from data_tools.raw.render.draw import draw_pages, open_pdf, page_image, page_text
from data_tools.raw.render.fonts import fonts_digest, load_fonts
from data_tools.raw.render.layout import lay_out
from data_tools.raw.render.template import draw_template
from megatron_vl.data.sample import IMAGE_MARK

PDF, HTML = ".pdf", (".html", ".htm", ".xhtml")
SUFFIXES = (PDF, *HTML, *pandoc.READERS)
DRAWN_WITH = ("fonttools", "fpdf2", "lxml", "matplotlib", "pypandoc_binary", "pypdfium2")
MAX_PARAGRAPH = 200_000  # characters; of one, all are in memory at once
MAX_PAGES = 200  # of a document; those after them are left out


def _drafts(material: Material, field: str) -> Sequence[str]:
    load_fonts(tuple(material.raw.fonts), field.removesuffix("file") + "fonts")
    return list_files(material.file, SUFFIXES, field)


def _digest(material: Material) -> str:
    """Of the documents, the fonts, and the versions of what draws them."""
    digests = [f"{name} {version(name)}" for name in DRAWN_WITH]
    digests.append(files_digest(material.file, SUFFIXES))
    digests += [fonts_digest(path) for path in material.raw.fonts]
    return "\n".join(digests)


def _read(material: Material, draft: str) -> Sequence[RawSample | RecordError]:
    data = read_file(material.file / draft, material.max_sample_bytes)
    pages = _given_pages(data) if draft.lower().endswith(PDF) else _laid_out_pages(material, draft, data)
    samples = [_sample(number, page) for number, page in enumerate(islice(pages, MAX_PAGES), start=1)]
    if not samples:
        raise RecordError("no text", "the document has none")
    return samples


def _sample(number: int, page: tuple[str, bytes] | RecordError) -> RawSample | RecordError:
    name = f"page {number}"
    try:
        if isinstance(page, RecordError):
            raise page
        text, image = page
        return RawSample(fields={"text": IMAGE_MARK + unmarked(text)}, images=[image], name=name)
    except RecordError as error:
        return RecordError(error.cause, error.detail, name)


def _given_pages(data: bytes) -> Iterator[tuple[str, bytes] | RecordError]:
    document = open_pdf(data)
    for number in range(len(document)):
        try:
            yield page_text(document, number), page_image(document, number)
        except RecordError as error:
            yield error


def _laid_out_pages(material: Material, draft: str, data: bytes) -> list[tuple[str, bytes] | RecordError]:
    blocks = _blocks(draft, data)
    fonts = load_fonts(tuple(material.raw.fonts), "raw.fonts")
    template = draw_template(draft, whole_text(blocks), fonts)
    pages = list(islice(lay_out(blocks, template, fonts), MAX_PAGES))
    document = open_pdf(draw_pages([page for page in pages if page.problem is None], template))
    images = (page_image(document, number) for number in range(len(document)))
    return [page.problem or (page.text, next(images)) for page in pages]


def _blocks(draft: str, data: bytes) -> list[Block]:
    suffix = Path(draft).suffix.lower()
    try:
        blocks = read_html(data if suffix in HTML else pandoc.to_html(data, suffix))
    except ValueError as error:
        raise RecordError("not understood", str(error)) from error
    longest = max((len(block.text) for block in blocks), default=0)
    if longest > MAX_PARAGRAPH:
        raise RecordError(
            "not understood", f"a paragraph has {longest} characters; at most {MAX_PARAGRAPH} may"
        )
    return blocks


FORMAT = Format(drafts=_drafts, read=_read, digest=_digest, of_folder=True)
