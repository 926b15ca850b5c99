"""Markdown and LaTeX become HTML, by pandoc."""

import subprocess

import pypandoc

from data_tools.raw.format import RecordError

READERS = {".md": "markdown", ".markdown": "markdown", ".tex": "latex"}
TIMEOUT = 60  # seconds for a document
MEMORY = "1G"


def to_html(data: bytes, suffix: str) -> str:
    """HTML with formulas as LaTeX in `span.math`. Other files that the document names are not read.

    Raises RecordError for what pandoc cannot read in TIMEOUT and MEMORY.
    """
    command = [
        *(pypandoc.get_pandoc_path(), "--sandbox", "--from", READERS[suffix], "--to", "html", "--mathjax"),
        *("--wrap", "none", "+RTS", f"-M{MEMORY}", "-RTS"),
    ]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT, check=True)
    except subprocess.TimeoutExpired as error:
        raise RecordError("not understood", f"pandoc was not done in {TIMEOUT} seconds") from error
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise RecordError("not understood", f"pandoc: {message[-300:]}") from error
    return done.stdout.decode()
