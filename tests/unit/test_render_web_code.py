"""Code and its one figure: from scripts, from notebooks, and from HTML by a browser."""

import base64
import http.server
import io
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from data_tools.raw.format import Format, RawSample, RecordError
from data_tools.raw.web_code import notebooks, screenshots, scripts
from megatron_vl.config.errors import UserError
from tests.support.documents import material
from tests.support.tiny_data import picture

CODE = "import numpy\n\n# a comment\nx = 1\ny = 2\nz = 3\nprint(x)\n"  # five lines of code
FEW = "import numpy\n# one\n# two\n    # three\n#four\n\nx = 1\n"


def outcomes(format: Format, folder: Path) -> dict[str, list[RawSample | str]]:
    """By draft, its samples, or the causes why they are none."""
    found: dict[str, list[RawSample | str]] = {}
    for draft in format.drafts(material(folder), "raw.file"):
        try:
            samples = format.read(material(folder), draft)
        except RecordError as error:
            samples = [error]
        found[str(draft)] = [s.cause if isinstance(s, RecordError) else s for s in samples]
    return found


def test_scripts_and_their_figures(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "copies").mkdir()
    for name, code in {"plot_a": CODE, "plot_b": CODE, "plot_c": FEW, "plain": CODE, "none": CODE}.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "copies/plot_a.py").write_text(CODE)
    (tmp_path / "marked.py").write_text(CODE + "'<image>'")
    figures = ("sphx_glr_plot_a_001", "sphx_glr_plot_b_001", "sphx_glr_plot_b_002", "sphx_glr_plot_c_001")
    for name in (*figures, "sphx_glr_plot_a_thumb", "plain", "marked"):
        (tmp_path / f"images/{name}.png").write_bytes(picture())
    found = outcomes(scripts.FORMAT, tmp_path)
    (gallery,), (plain,) = found.pop("copies/plot_a.py"), found.pop("plain.py")
    assert isinstance(gallery, RawSample) and isinstance(plain, RawSample)
    assert gallery.fields == plain.fields == {"text": "<image>" + CODE.strip()}
    assert (gallery.images, plain.images) == (["images/sphx_glr_plot_a_001.png"], ["images/plain.png"])
    assert found == {
        "plot_b.py": ["several images"],
        "plot_c.py": ["little code"],
        "none.py": ["no image"],
        "marked.py": ["images do not match the marks"],
    }


def cell(code: str | list[str], *images: bytes, kind: str = "image/png") -> dict[str, Any]:
    outputs: list[dict[str, Any]] = [{"output_type": "stream", "text": "42"}]
    for data in images:
        text = base64.encodebytes(data).decode()
        outputs.append({"output_type": "display_data", "data": {kind: text, "text/plain": "<Figure>"}})
    return {"cell_type": "code", "source": code, "outputs": outputs}


def write_notebook(path: Path, *cells: dict[str, Any]) -> None:
    path.write_text(json.dumps({"nbformat": 4, "metadata": {}, "cells": cells}))


def test_notebooks_and_their_figures(tmp_path: Path) -> None:
    """A figure has the code since the one before."""
    png, jpeg = picture(seed=1), picture(seed=2, file_format="JPEG")
    lines = CODE.splitlines(keepends=True)
    write_notebook(
        tmp_path / "a.ipynb",
        {"cell_type": "markdown", "source": "# Title"},
        cell(lines[:4]),
        cell(lines[4:], png),
        cell(FEW, png),
        cell(CODE, png, png),
        cell(CODE, jpeg, kind="image/jpeg"),
        cell("after = 1"),
    )
    first, few, several, second = outcomes(notebooks.FORMAT, tmp_path)["a.ipynb"]
    assert isinstance(first, RawSample) and isinstance(second, RawSample)
    assert first.images == [png] and second.images == [jpeg]
    code = first.fields["text"].removeprefix("<image>")
    assert [line for line in code.splitlines() if line] == [line for line in CODE.splitlines() if line]
    assert second.fields["text"] == "<image>" + CODE.strip()
    assert (few, several) == ("little code", "several images")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "not a notebook"),
        ("[]", "not a notebook"),
        ('{"worksheets": []}', "not a notebook"),
        ('{"cells": [{"cell_type": "code", "source": 3, "outputs": []}]}', "not a notebook"),
        ("[" * 100_000, "not a notebook"),
        (json.dumps({"cells": [cell(CODE)]}), "no image"),
        (
            json.dumps({"cells": [cell(CODE, b"")]}).replace('"image/png": ""', '"image/png": "a"'),
            "not a notebook",
        ),
    ],
)
def test_notebooks_that_are_none(content: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text(content)
    assert outcomes(notebooks.FORMAT, tmp_path) == {"a.ipynb": [cause]}


def test_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs a Chromium on PATH"):
        screenshots.FORMAT.drafts(material(tmp_path), "raw.file")


def fake_browser(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "chromium").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("exit 3", "ended with 3"),
        ("exit 0", "no image"),
        ("sleep 300 & echo $! > $CHILD; wait", "not done in 1 seconds"),
    ],
)
def test_a_browser_that_fails(
    script: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_browser(tmp_path / "bin", script, monkeypatch)
    monkeypatch.setattr(screenshots, "TIMEOUT", 1)
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    (tmp_path / "a.html").write_text("<p>text</p>")
    with pytest.raises(RecordError, match=detail) as raised:
        screenshots.screenshot(tmp_path / "a.html", 768)
    assert raised.value.cause == "browser failed"
    if (tmp_path / "child").exists():
        child = int((tmp_path / "child").read_text())
        deadline = time.monotonic() + 20  # it was killed; the system may take a moment
        while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, screenshots.BROWSERS)), reason="no Chromium on PATH"
)


@needs_browser
def test_a_page_and_what_it_shows(tmp_path: Path) -> None:
    """The screenshot ends a little below what is on the page; a red square is where the page puts it."""
    square = '<div style="position:absolute; left:100px; top:200px; width:50px; height:50px; background:red"></div>'
    (tmp_path / "a.html").write_text(f"<html><body>{square}</body></html>")
    (sample,) = outcomes(screenshots.FORMAT, tmp_path)["a.html"]
    assert isinstance(sample, RawSample)
    assert sample.fields["text"] == f"<image><html><body>{square}</body></html>"
    with Image.open(io.BytesIO(sample.images[0])) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] == 250 + screenshots.BLANK and pixels.shape[1] in screenshots.WIDTHS
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (200, 249, 100, 149)


@needs_browser
@pytest.mark.parametrize(
    ("html", "cause"), [("<body></body>", "blank page"), ("<p>line</p>" * 400, "page too long")]
)
def test_pages_that_cannot_be_used(html: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(html)
    assert outcomes(screenshots.FORMAT, tmp_path) == {"a.html": [cause]}


@needs_browser
def test_a_page_reaches_no_network(tmp_path: Path) -> None:
    """Not even a server of this machine."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hosts = [f"{host}:{server.server_port}" for host in ("127.0.0.1", "localhost")]
        images = "".join(
            f'<img src="http://{host}/1.png"><script src="http://{host}/1.js"></script>' for host in hosts
        )
        (tmp_path / "a.html").write_text(f"<p>text</p>{images}")
        assert isinstance(outcomes(screenshots.FORMAT, tmp_path)["a.html"][0], RawSample)
        server.shutdown()
        thread.join()
    assert asked == []
