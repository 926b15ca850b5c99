"""What of a web page is its text, and in which form."""

import pytest

from data_tools.raw.format import RecordError
from data_tools.raw.render.blocks import FORMULA, read_html
from data_tools.raw.render.pandoc import to_html


def kinds(html: str | bytes) -> list[tuple[str, str]]:
    return [(block.kind, block.text) for block in read_html(html)]


def test_the_main_content_alone() -> None:
    page = """<html><head><title>t</title><style>p {}</style></head><body><nav>menu</nav>
      <div class="sphinxsidebar">side</div>
      <div role="main"><h2>Title<a class="headerlink">¶</a></h2> loose <b>text</b>
      <p>One<script>x()</script> two.</p><p hidden>three</p></div><footer>end</footer></body></html>"""
    assert kinds(page) == [("heading", "Title"), ("paragraph", "loose text"), ("paragraph", "One two.")]


def test_lists_are_numbered_and_marked() -> None:
    page = "<ol><li>a<ul><li>x</li><li><p>y</p><p>z</p></li></ul></li><li>b</li></ol>"
    blocks = read_html(page)
    assert [(block.text, block.level) for block in blocks] == [
        *(("1. a", 1), ("• x", 2), ("• y", 2), ("z", 2), ("2. b", 1)),
    ]


def test_rows_and_cells() -> None:
    page = """<table><tr><th>a</th><th></th><th>b</th></tr><tr><td><p>1</p><p>2</p></td><td>3</td></tr>
      <tr><td></td><td><p>note</p><pre>x = 1
  y</pre></td></tr></table>"""
    assert kinds(page) == [
        ("row", "a |  | b"),
        ("row", "1 2 | 3"),
        ("paragraph", "note"),
        ("code", "x = 1\n  y"),
    ]


def test_white_space_and_characters() -> None:
    page = (
        "<p>a \n\u00a0 b</p><p>中文\n  换行 not</p><p>e\u0301\u00ad\u200b</p><pre>\ta  b \n\nc</pre><p> </p>"
    )
    assert [text for _, text in kinds(page)] == ["a b", "中文换行 not", "é", "    a  b\n\nc"]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_encodings(encoding: str) -> None:
    page = f'<html><head><meta charset="{encoding}"></head><body><p>中文页面</p></body></html>'
    assert kinds(page.encode(encoding)) == [("paragraph", "中文页面")]
    assert kinds("<p>未声明</p>".encode()) == [("paragraph", "未声明")]


@pytest.mark.parametrize("page", ["", "<div>" * 3000 + "deep"])
def test_pages_that_are_none(page: str) -> None:
    with pytest.raises(ValueError):
        read_html(page)


@pytest.mark.parametrize(
    ("suffix", "document"),
    [
        (".md", "# Title\n\nLet $a^2$ be.\n\n$$b_1$$\n\n- item\n"),
        (".tex", r"\section{Title} Let $a^2$ be. \[b_1\] \begin{itemize}\item item\end{itemize}"),
    ],
)
def test_markdown_and_latex(suffix: str, document: str) -> None:
    blocks = read_html(to_html(document.encode(), suffix))
    assert (blocks[0].kind, blocks[0].text) == ("heading", "Title")
    assert (blocks[-1].kind, blocks[-1].text) == ("item", "• item")
    assert [formula for block in blocks for formula in block.formulas] == ["a^2", "b_1"]
    assert sum(block.text.count(FORMULA) for block in blocks) == 2


def test_other_files_are_not_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.tex"
    secret.write_text("the secret")
    document = (
        rf"\documentclass{{article}}\begin{{document}}Before. \input{{{secret}}} After.\end{{document}}"
    )
    assert "secret" not in to_html(document.encode(), ".tex").replace(str(secret), "")


def test_what_pandoc_cannot_read() -> None:
    with pytest.raises(RecordError) as raised:
        to_html(rb"\begin{itemize} no end", ".tex")
    assert raised.value.cause == "not understood" and "\n" not in raised.value.detail
