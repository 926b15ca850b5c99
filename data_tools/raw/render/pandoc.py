"""Other markup becomes HTML or plain text, by pandoc."""

import subprocess

import pypandoc

from data_tools.raw.format import RecordError

READERS = {".md": "markdown", ".markdown": "markdown", ".tex": "latex"}
TIMEOUT = 60  # seconds for a document
MEMORY = "1G"


def to_html(data: bytes, suffix: str) -> str:
    """HTML with formulas as LaTeX in `span.math`. Raises RecordError."""
    return convert(data, READERS[suffix], "html", "--mathjax")


def convert(data: bytes, reader: str, writer: str, *options: str) -> str:
    """A document in another markup, lines not wrapped. Other files that the document names are not read.

    Raises RecordError for what pandoc cannot read in TIMEOUT and MEMORY.
    """
    command = [
        *(
            pypandoc.get_pandoc_path(),
            "--sandbox",
            "--from",
            reader,
            "--to",
            writer,
            "--wrap",
            "none",
            *options,
        ),
        *("+RTS", f"-M{MEMORY}", "-RTS"),
    ]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT, check=True)
    except subprocess.TimeoutExpired as error:
        raise RecordError("not understood", f"pandoc was not done in {TIMEOUT} seconds") from error
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.decode(errors="replace").split())
        raise RecordError("not understood", f"pandoc: {message[-300:]}") from error
    return done.stdout.decode()
