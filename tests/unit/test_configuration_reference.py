"""docs/configuration.md is what the schemas and values say, and says it of every field."""

from dataclasses import fields, is_dataclass
from typing import get_type_hints

from tools.configuration_reference import COMMANDS, PAGE, page, sections

REMEDY = "write it again: python -m tools.configuration_reference"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), REMEDY


def test_every_field_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for root in COMMANDS.values():
        hints = get_type_hints(root)
        for entry in fields(root):
            if is_dataclass(hints[entry.name]):
                assert f"`{entry.name}`" in text or f"`{entry.name}." in text, REMEDY
            else:
                assert f"| `{entry.name}` |" in text, REMEDY


def test_a_schema_is_described_once_with_all_its_places() -> None:
    places = {section.schema.__name__: section.paths for section in sections()}
    assert places["StageConfig"] == ["stage.adaptor", "stage.joint", "stage.sft"]
    assert places["SourceConfig"] == ["data.sources.NAME"]
    assert places["BenchmarkConfig"] == ["evaluation.benchmarks.NAME"]
    assert len(sections()) == len(places)
