"""The sample pictures that scikit-image's package contains, with the first line of their documentation."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import skimage.data

# Where the function that documents a picture is not named as its file.
DOCUMENTED_BY = {
    "chessboard_GRAY": "checkerboard",
    "clock_motion": "clock",
    "color": "colorwheel",
    "ihc": "immunohistochemistry",
    "phantom": "shepp_logan_phantom",
}


@dataclass(frozen=True)
class Photograph:
    path: Path
    caption: str


def installed_photographs() -> list[Photograph]:
    """The documented PNG and JPEG files of the installed package, by name; nothing is downloaded."""
    folder = Path(skimage.data.__file__).parent
    photographs = []
    for path in sorted((*folder.glob("*.jpg"), *folder.glob("*.png"))):
        name = DOCUMENTED_BY.get(path.stem, path.stem)
        if name in skimage.data.__all__:
            documentation = inspect.getdoc(getattr(skimage.data, name)) or ""
            photographs.append(Photograph(path, documentation.partition("\n")[0]))
    return photographs
