"""The format scripts: Python scripts and the figures that they drew, in one folder and those below it.

The figures of plot_x.py are sphx_glr_plot_x_001.png, …_002.png, as sphinx-gallery names them, or plot_x.png.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_tools.raw.files import files_digest, list_files, read_text
from data_tools.raw.format import Format, Material, RawSample
from data_tools.raw.web_code.code import code_sample

SCRIPT, IMAGE = ".py", ".png"
GALLERY = re.compile(r"sphx_glr_(.+)_[0-9]{3}")


@dataclass(frozen=True)
class Script:
    """Names, relative to the folder."""

    name: str
    figures: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def _drafts(material: Material, field: str) -> Sequence[Script]:
    """Scripts of one name are one: documentation has copies of them."""
    figures = defaultdict(list)
    for name in list_files(material.file, (IMAGE,), field):
        stem = PurePosixPath(name).stem
        gallery = GALLERY.fullmatch(stem)
        figures[gallery[1] if gallery else stem].append(name)
    scripts: dict[str, Script] = {}
    for name in list_files(material.file, (SCRIPT,), field):
        stem = PurePosixPath(name).stem
        scripts.setdefault(stem, Script(name, tuple(figures.get(stem, ()))))
    return list(scripts.values())


def _read(material: Material, draft: Script) -> Sequence[RawSample]:
    return [
        code_sample(list(draft.figures), read_text(material.file / draft.name, material.max_sample_bytes))
    ]


FORMAT = Format(
    drafts=_drafts,
    read=_read,
    digest=lambda material: files_digest(material.file, (SCRIPT,), (IMAGE,)),
    of_folder=True,
)
