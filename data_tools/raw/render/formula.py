"""LaTeX formulas as small pictures, by matplotlib's mathtext."""

import io
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser, RasterParse
from PIL import Image

from data_tools.raw.format import RecordError

SCALE = 4  # pixels a point
MAX_LENGTH = 1000  # characters
# LaTeX's other names of what mathtext has. Sizes of brackets and of fractions are left to it.
SYNONYMS = {
    **{"le": r"\leq", "ge": r"\geq", "land": r"\wedge", "lor": r"\vee", "gets": r"\leftarrow"},
    **{"implies": r"\Longrightarrow", "iff": r"\Longleftrightarrow", "lvert": "|", "rvert": "|"},
    **{"tfrac": r"\frac", "bm": r"\boldsymbol", "textrm": r"\text", "displaystyle": ""},
    **dict.fromkeys(("big", "Big", "bigl", "bigr", "Bigl", "Bigr"), ""),
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A transparent PNG file. Lengths are in points; `depth` of the height is below the line."""

    png: bytes
    width: float
    height: float
    depth: float


@cache
def _parser() -> "MathTextParser[RasterParse]":  # generic in its stub alone
    return MathTextParser("agg")


def draw_formula(source: str, size: float, ink: tuple[int, int, int]) -> Picture:
    """Raises RecordError for what mathtext does not know: matrices, aligned lines, macros of the document's own."""
    if len(source) > MAX_LENGTH:
        raise RecordError(
            "formula not drawn", f"it has {len(source)} characters; at most {MAX_LENGTH} are drawn"
        )
    known = re.sub(r"\\([A-Za-z]+)", lambda command: SYNONYMS.get(command[1], command[0]), source)
    try:
        parsed = _parser().parse(f"${known}$", dpi=72 * SCALE, prop=FontProperties(size=size))
    except (ValueError, RuntimeError, RecursionError) as error:
        raise RecordError(
            "formula not drawn", f"${source}$: {str(error).strip().splitlines()[-1]}"
        ) from error
    alpha = np.asarray(parsed.image)
    picture = Image.new("RGBA", (alpha.shape[1], alpha.shape[0]), ink)
    picture.putalpha(Image.fromarray(alpha))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Picture(
        png=file.getvalue(),
        width=alpha.shape[1] / SCALE,
        height=alpha.shape[0] / SCALE,
        depth=parsed.depth / SCALE,
    )
