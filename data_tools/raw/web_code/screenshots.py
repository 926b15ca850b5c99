"""The format screenshots: HTML files of a folder, and what a Chromium on this machine shows of them.

The page is shown without network. The image is the whole page, one of WIDTHS wide; a page that is longer than
MAX_HEIGHT cannot be used.
"""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.raw.fields import unmarked
from data_tools.raw.files import files_digest, list_files, read_text
from data_tools.raw.format import Format, Material, RawSample, RecordError
from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK

SUFFIXES = (".html", ".htm")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 60  # seconds for a page
WIDTHS = (1280, 1024, 768)  # pixels; drawn from the file's name
MAX_HEIGHT = 2560  # pixels
WINDOW_HEIGHT = 2 * MAX_HEIGHT  # what shows in its lower half is beyond the limit
BLANK = 8  # pixels of one colour that are left below all else


def _drafts(material: Material, field: str) -> Sequence[str]:
    browser()
    return list_files(material.file, SUFFIXES, field)


def _read(material: Material, draft: str) -> Sequence[RawSample]:
    path = material.file / draft
    html = unmarked(read_text(path, material.max_sample_bytes).strip())
    return [RawSample(fields={"text": IMAGE_MARK + html}, images=[screenshot(path, _width(draft))])]


def browser() -> str:
    """The first of BROWSERS on PATH. Raises UserError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UserError(f"the format screenshots needs a Chromium on PATH, one of {', '.join(BROWSERS)}")
    return found


def screenshot(path: Path, width: int) -> bytes:
    """A PNG file of a local HTML file, `width` pixels wide and as high as the page.

    Raises RecordError: the browser fails or is not done in TIMEOUT, the page is blank or higher than MAX_HEIGHT.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "page.png"
        _run([browser(), *_options(folder, target, width), path.resolve().as_uri()])
        if not target.is_file():
            raise RecordError("browser failed", "it wrote no image")
        with Image.open(target) as image:
            picture = image.convert("RGB")
    height = _height(np.asarray(picture))
    file = io.BytesIO()
    picture.crop((0, 0, width, height)).save(file, "PNG")
    return file.getvalue()


def _options(folder: str, target: Path, width: int) -> list[str]:
    options = [
        *("--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions"),
        *("--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--mute-audio"),
        "--host-resolver-rules=MAP * ~NOTFOUND",  # no network, nor servers of this machine
        f"--user-data-dir={folder}/profile",
        f"--screenshot={target}",
        f"--window-size={width},{WINDOW_HEIGHT}",
    ]
    # Chromium's sandbox does not work for root.
    return [*options, "--no-sandbox"] if os.geteuid() == 0 else options


def _run(command: list[str]) -> None:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise RecordError("browser failed", f"it was not done in {TIMEOUT} seconds") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
    if code:
        raise RecordError("browser failed", f"it ended with {code}")


def _height(pixels: np.ndarray) -> int:
    """Rows down to the last that differs from the lowest, and BLANK more."""
    differs = np.flatnonzero((pixels != pixels[-1, 0]).any(axis=(1, 2)))
    if not len(differs):
        raise RecordError("blank page", "all pixels are of one colour")
    height = int(differs[-1]) + 1 + BLANK
    if height > MAX_HEIGHT:
        raise RecordError("page too long", f"it goes on after {MAX_HEIGHT} pixels")
    return height


def _width(name: str) -> int:
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return WIDTHS[int.from_bytes(digest, "big") % len(WIDTHS)]


FORMAT = Format(
    drafts=_drafts,
    read=_read,
    digest=lambda material: files_digest(material.file, SUFFIXES),
    of_folder=True,
)
