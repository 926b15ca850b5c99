"""Document pages: a few words of the Python installation's text, legible to the smallest encoder."""

import io
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

PAGE_SIZE = 256  # pixels, both sides
LETTER_SIZE, LINE_PITCH, MARGIN = 52, 85, 14  # pixels
MAX_LINES = 3
FONT = "fonts/ttf/DejaVuSans-Bold.ttf"  # in matplotlib's data folder


def draw_texts(words: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """`count` distinct page texts of one to MAX_LINES lines, a word on each."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        num_lines = generator.randint(1, MAX_LINES)
        texts["\n".join(generator.choices(words, k=num_lines))] = None
    return list(texts)


def render_page(text: str) -> bytes:
    """The page as a greyscale PNG file of PAGE_SIZE x PAGE_SIZE pixels."""
    page = Image.new("L", (PAGE_SIZE, PAGE_SIZE), color=255)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(text.splitlines()):
        middle = LINE_PITCH * number + LINE_PITCH // 2
        pen.text((MARGIN, middle), line, fill=0, font=_font(), anchor="lm")
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / FONT
    return ImageFont.truetype(path, LETTER_SIZE)
