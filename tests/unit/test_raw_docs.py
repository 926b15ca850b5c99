"""The examples of docs/data.md are read as it says."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from data_tools.raw.documents import read_caption, read_interleaved, read_text
from data_tools.raw.filters import check_filters
from data_tools.raw.format import Material
from data_tools.raw.formats import FORMATS
from data_tools.raw.tables import read_table
from megatron_vl.config.data import FilterConfig, RawConfig

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def lines_of(section: str) -> list[str]:
    """The lines of a section's examples."""
    text = DOCS.split(f"\n{section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return [
        line
        for block in re.findall(r"```(?:json)?\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]


def read(folder: Path, format: str, name: str, content: str) -> str:
    """The text of the one sample that a file of an example holds."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/7.jpg").touch()
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    material = Material(
        source="x",
        raw=RawConfig(format=format, file=str(file), images=str(folder / "images")),
        image_folder=folder / "images",
        modality="multimodal",
        has_heldout=False,
        max_sample_bytes=10_000,
        max_image_pixels=100,
    )
    ((sample,),) = [
        FORMATS[format].read(material, draft) for draft in FORMATS[format].drafts(material, "field")
    ]
    return str(sample.fields["text"])


def test_captions(tmp_path: Path) -> None:
    record, coco = lines_of("### Captions")
    assert read_caption(json.loads(record), "").fields == {"text": "<image>A red bar."}
    assert read(tmp_path, "captions", "coco.json", coco) == "<image>A red bar."


def test_interleaved_documents_and_text() -> None:
    mmc4, obelics = map(json.loads, lines_of("### Interleaved documents"))
    assert read_interleaved(mmc4, "").fields == {"text": "Sales rose.\n<image>Costs fell."}
    assert read_interleaved(obelics, "").fields == {"text": "Sales rose.\n<image>"}
    (document,) = map(json.loads, lines_of("### Text"))
    assert read_text(document, "").fields == document


def test_tables() -> None:
    texts = [read_table(json.loads(line), "").fields["text"] for line in lines_of("### Tables and charts")]
    assert texts == [
        "<image>Which year was best?\n2024",
        "<image>Year | Sales\n2024 | 7.5",
        "<image><table><tr><td>a</td></tr></table>",
    ]


def test_scenes(tmp_path: Path) -> None:
    icdar, *others = lines_of("### Text in scenes")
    names = ["labels.txt", "lsvt.json", "textocr.json", "words.jsonl"]
    for name, line in zip(names, others, strict=True):
        assert read(tmp_path / name, "scene_text", name, line) == "<image>Sales"
    truths = FORMATS["scene_text"]
    (tmp_path / "truths").mkdir()
    (tmp_path / "truths/7.txt").write_text(icdar)
    (tmp_path / "truths/7.jpg").touch()
    material = Material(
        source="x",
        raw=RawConfig(format="scene_text", file=f"{tmp_path}/truths"),
        image_folder=tmp_path / "truths",
        modality="multimodal",
        has_heldout=False,
        max_sample_bytes=10_000,
        max_image_pixels=100,
    )
    ((sample,),) = [truths.read(material, draft) for draft in truths.drafts(material, "field")]
    assert sample.fields == {"text": "<image>Genaxis Theatre"}


def test_filters() -> None:
    (block,) = re.findall(r"```yaml\n(    raw:\n      filters:.*?)```", DOCS, re.DOTALL)
    values = yaml.safe_load(block)["raw"]["filters"]
    assert values.keys() == asdict(FilterConfig()).keys()
    check_filters(FilterConfig(**values), "filters")


@pytest.mark.parametrize(
    "name", ["conversations", "captions", "interleaved", "web_pages", "tables", "scene_text"]
)
def test_every_format_is_described(name: str) -> None:
    assert name in FORMATS
    assert re.search(rf"`?format: {name}\b|`format: {name}`", DOCS)
