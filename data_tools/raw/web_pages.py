"""The format web_pages: a folder of saved HTML pages; a page's text in reading order, its images where they stand."""

import base64
import binascii
import posixpath
import re
import warnings
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PreformattedString, Tag

from data_tools.raw.fields import unmarked
from data_tools.raw.files import files_digest, list_files, read_file
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.navigation import is_navigation
from megatron_vl.data.sample import IMAGE_FORMATS, IMAGE_MARK

SUFFIXES = (".html", ".htm", ".xhtml")
IMAGE_SUFFIXES = tuple(f".{name}" for name in IMAGE_FORMATS)
# What is no text of the page, or not this page's own.
DROPPED = {
    "script",
    "style",
    "noscript",
    "template",
    "head",
    "nav",
    "footer",
    "aside",
    "form",
    "button",
    "select",
}
DROPPED |= {"svg", "math", "iframe", "object", "video", "audio"}
BLOCKS = {
    "p",
    "div",
    "section",
    "article",
    "main",
    "header",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "ul",
    "ol",
    "li",
}
BLOCKS |= {
    "dl",
    "dt",
    "dd",
    "table",
    "tr",
    "blockquote",
    "pre",
    "figure",
    "figcaption",
    "details",
    "summary",
    "hr",
    "br",
}
CELLS = {"td", "th"}
warnings.filterwarnings("ignore", category=XMLParsedAsHTMLWarning)  # XHTML may be read as HTML
DATA_ADDRESS = re.compile(r"data:image/(png|jpeg|webp);base64,(.*)", re.DOTALL)


def _read(material: Material, draft: str) -> Sequence[RawSample]:
    data = read_file(material.file / draft, material.max_sample_bytes)
    try:
        page = BeautifulSoup(data, "lxml")
        pieces = list(_pieces(page.find("main") or page.body or page))
    except RecursionError as error:
        raise RecordError("no text", "its elements are nested too deeply") from error
    images: list[str | bytes] = []
    text = ""
    for piece in pieces:
        image = _image(piece, draft) if isinstance(piece, Tag) else None
        if image is not None:
            images.append(image)
            text += f"\n{IMAGE_MARK}\n"
        elif isinstance(piece, str):
            text += unmarked(piece)
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in text.split("\n"))
    return [RawSample(fields={"text": "\n".join(filter(None, lines))}, images=images)]


def _pieces(element: Tag) -> Iterator[str | Tag]:
    """Texts, with newlines around blocks, and img elements."""
    for child in element.children:
        if isinstance(child, Tag):
            if child.name == "img":
                yield child
            elif child.name not in DROPPED and not _is_navigation(child):
                edge = "\n" if child.name in BLOCKS else " " if child.name in CELLS else ""
                yield edge
                yield from _pieces(child)
                yield edge
        elif isinstance(child, NavigableString) and not isinstance(
            child, PreformattedString
        ):  # those: comments, …
            is_literal = element.name == "pre"
            yield str(child) if is_literal else re.sub(r"\s+", " ", child)


def _is_navigation(element: Tag) -> bool:
    role = element.get("role")
    return is_navigation(element.get_attribute_list("class"), role if isinstance(role, str) else None)


def _image(element: Tag, page: str) -> str | bytes | None:
    """A file of the folder, or the bytes that the page holds; None for what was not saved or has another format."""
    source = str(element.get("src") or "").strip()
    if match := DATA_ADDRESS.fullmatch(source):
        try:
            return base64.b64decode(match[2])
        except binascii.Error as error:
            raise RecordError("image cannot be decoded", f"its base64 is broken: {error}") from error
    address = urlsplit(source)
    path = unquote(address.path)
    if address.scheme or address.netloc or not path.lower().endswith(IMAGE_SUFFIXES):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)).lstrip("/")


FORMAT = Format(
    drafts=lambda material, field: list_files(material.file, SUFFIXES, field),
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES, IMAGE_SUFFIXES),
    of_folder=True,
)
