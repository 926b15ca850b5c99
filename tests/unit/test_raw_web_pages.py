"""Saved pages: their text in reading order, images where they stand, nothing of what surrounds them."""

import base64
from pathlib import Path

import pytest

from data_tools.raw.format import Material, RawSample, RecordError
from data_tools.raw.web_pages import FORMAT
from megatron_vl.config.data import RawConfig
from megatron_vl.config.errors import UserError
from tests.support.tiny_data import picture

PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>Not text</title><style>p {color: red}</style></head>
<body>
<nav><a href="/">Home</a> <img src="logo.png"></nav>
<main>
<div class="navheader"><img src="next.png"></div><div role="navigation">menu</div>
<h1>Sales &amp;
   costs</h1>
<p>They <b>rose</b>, as <a href="x">图 1</a> shows.<br>See:</p>
<figure><img src="figures/a%20b.png?v=2" alt="A chart"><figcaption>Figure 1</figcaption></figure>
<script>alert("no")</script><!-- no -->
<table><tr><th>Year</th><td>2024</td></tr><tr><td>a</td><td>b</td></tr></table>
<pre>x = 1
  y</pre>
<img src="https://example.org/remote.png"><img src="drawing.svg"><img>
<ul><li>One</li><li>Two <img src='data:image/png;base64,{data}'> three</li></ul>
</main>
<footer>Imprint</footer>
</body></html>"""
TEXT = (
    "Sales & costs\nThey rose, as 图 1 shows.\nSee:\n<image>\nFigure 1\nYear 2024\na b\nx = 1\ny\nOne\nTwo\n<image>\n"
    "three"
)


def read(folder: Path, page: str | bytes, name: str = "index.html") -> RawSample:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page if isinstance(page, bytes) else page.encode())
    material = of(folder)
    (draft,) = FORMAT.drafts(material, "field")
    (sample,) = FORMAT.read(material, draft)
    return sample


def of(folder: Path) -> Material:
    return Material(
        source="x",
        raw=RawConfig(format="web_pages", file=str(folder)),
        image_folder=folder,
        modality="multimodal",
        has_heldout=False,
        max_sample_bytes=100_000,
        max_image_pixels=10_000,
    )


def test_a_page(tmp_path: Path) -> None:
    image = picture()
    sample = read(tmp_path, PAGE.replace("{data}", base64.b64encode(image).decode()), "below/page.html")
    assert sample.fields == {"text": TEXT}
    assert list(sample.images) == ["below/figures/a b.png", image]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a.png", "docs/a.png"),
        ("./a.PNG", "docs/a.PNG"),
        ("../a.webp#top", "a.webp"),
        ("/img/a.jpeg", "img/a.jpeg"),
        ("../../a.png", "../a.png"),  # which reading the image refuses
    ],
)
def test_where_an_image_lies(source: str, name: str, tmp_path: Path) -> None:
    assert list(read(tmp_path, f'Text <img src="{source}">', "docs/page.htm").images) == [name]


@pytest.mark.parametrize(
    "source",
    ["", "http://x/a.png", "//x/a.png", "a.gif", "a", "data:image/gif;base64,AAAA", "javascript:a.png"],
)
def test_what_was_not_saved_is_no_image(source: str, tmp_path: Path) -> None:
    sample = read(tmp_path, f'Text <img src="{source}"> goes on')
    assert (sample.fields["text"], list(sample.images)) == ("Text goes on", [])


def test_the_page_says_its_encoding(tmp_path: Path) -> None:
    page = '<html><head><meta charset="gb2312"></head><body><p>图表</p></body></html>'
    assert read(tmp_path, page.encode("gb2312")).fields == {"text": "图表"}


@pytest.mark.parametrize(
    ("page", "cause"),
    [
        ("<p>an &lt;image&gt;", "images do not match the marks"),
        ('<img src="data:image/png;base64,A">', "image cannot be decoded"),
        ("a" * 100_001, "sample too large"),
    ],
)
def test_what_cannot_be_used_has_a_cause(page: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as raised:
        read(tmp_path, page)
    assert raised.value.cause == cause


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    assert read(tmp_path, "<div>" * 300 + "end").fields == {"text": "end"}
    with pytest.raises(RecordError, match="nested too deeply"):
        read(tmp_path, "<div>" * 9000 + "end")


def test_a_folder_without_pages_and_a_changed_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"field is .*, which holds no files of \.html"):
        FORMAT.drafts(of(tmp_path), "field")
    read(tmp_path, "one")
    before = FORMAT.digest(of(tmp_path))
    read(tmp_path, "two")
    assert FORMAT.digest(of(tmp_path)) != before
