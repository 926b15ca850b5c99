"""What the Debian packages' files say, and that the data sets made of them are in order."""

import gzip
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from data_tools.raw import man_pages, named_images, text_files
from data_tools.raw.format import Format, RawSample, RecordError
from data_tools.raw.formats import FORMATS
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import register_schemas
from tests.support.documents import material
from tests.support.tiny_data import picture


def texts(format: Format, folder: Path) -> dict[str, list[str]]:
    """By draft, the texts of its samples, or the cause why there are none."""
    found = {}
    for draft in format.drafts(material(folder), "raw.file"):
        try:
            samples = format.read(material(folder), draft)
            found[draft] = [s.fields["text"] if isinstance(s, RawSample) else s.cause for s in samples]
        except RecordError as error:
            found[draft] = [error.cause]
    return found


def test_stamps_have_a_caption_in_each_language(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    for name in ("cat", "cat_mirror", "dog", "eel"):
        (tmp_path / f"animals/{name}.png").write_bytes(picture())
    (tmp_path / "animals/cat.txt").write_text("A cat.\nfr.utf8=Un chat.\nzh_CN.utf8=猫。\nzh_TW.utf8=貓。\n")
    (tmp_path / "animals/dog.txt").write_text("A dog.\nzh_CN.utf8=\n")
    (tmp_path / "animals/eel.txt").write_text("\n")
    (tmp_path / "animals/fox.txt").write_text("A fox.\n")  # a drawing of another kind
    assert texts(named_images.STAMPS, tmp_path) == {
        "animals/cat.png": ["<image>A cat.", "<image>猫。"],
        "animals/dog.png": ["<image>A dog."],
        "animals/eel.png": ["no text"],
    }


def test_images_with_names(tmp_path: Path) -> None:
    (tmp_path / "sea_side/boats").mkdir(parents=True)
    for name in ("sea_side/boats/red_ship_02.png", "sun.png", "17.png"):
        (tmp_path / name).write_bytes(picture())
    assert texts(named_images.NAMED_IMAGES, tmp_path) == {
        "17.png": ["no text"],
        "sea_side/boats/red_ship_02.png": ["<image>sea side, boats: red ship"],
        "sun.png": ["<image>sun"],
    }


def test_text_files(tmp_path: Path) -> None:
    contents = {
        "a.txt": "\ufeffOne\r\ntwo \n".encode(),
        "b.md": b"\n",
        "c.rst": b"\xff",
        "d.txt": b"an <image>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.png").write_bytes(picture())
    assert texts(text_files.FORMAT, tmp_path) == {
        "a.txt": ["One\ntwo"],
        "b.md": ["no text"],
        "c.rst": ["no text"],
        "d.txt": ["images do not match the marks"],
    }


def test_manual_pages(tmp_path: Path) -> None:
    page = '.TH LS 1 "GNU" 用户命令\n.SH 名称\nls \\- 列出目录内容\n.SH 描述\n\\fB\\-a\\fP 全部\n'
    (tmp_path / "ls.1.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "link.1.gz").write_bytes(gzip.compress(b".so man1/ls.1\n"))
    (tmp_path / "cut.1.gz").write_bytes(gzip.compress(page.encode())[:40])
    (tmp_path / "bomb.1.gz").write_bytes(gzip.compress(bytes(10_000_001)))
    found = texts(man_pages.FORMAT, tmp_path)
    (text,) = found.pop("ls.1.gz")
    assert [line.strip() for line in text.splitlines() if line] == [
        "名称",
        "ls - 列出目录内容",
        "描述",
        "-a 全部",
    ]
    assert found == {
        "bomb.1.gz": ["sample too large"],
        "cut.1.gz": ["cannot be read"],
        "link.1.gz": ["no text"],
    }


def test_what_a_format_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("data_tools.raw.man_pages", "data_tools.raw.render.pandoc"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pypandoc", None)
    with pytest.raises(UserError, match=r"needs pypandoc: pip install 'megatron-vl\[build\]'"):
        FORMATS["man_pages"].drafts(material(tmp_path), "raw.file")


@pytest.mark.parametrize("name", ["debian", "debian_captions", "debian_screenshots"])
def test_data_sets_of_packages(name: str) -> None:
    """Every source is read by a format that there is, from a package that is fetched for it."""
    register_schemas()
    with initialize_config_module("hydra_conf", version_base="1.3"):
        data = compose("pretrain", overrides=[f"data={name}"]).data
    for source in data.sources.values():
        assert source.raw.format in FORMATS
        assert any(
            source.raw.file.startswith(f"data/raw/debian/{package}/") for package in source.raw.packages
        )
        assert (source.raw.heldout_fraction > 0) == (source.heldout is not None)
        for font in source.raw.fonts:
            assert any(font.startswith(f"data/raw/debian/{package}/") for package in source.raw.packages)
    assert data.build_command == f"python -m data_tools.build data={name}"
