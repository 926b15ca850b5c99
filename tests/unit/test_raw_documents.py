"""Captions, interleaved documents and texts become the documents that training reads."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.builder import build
from data_tools.raw.documents import read_caption, read_interleaved, read_text
from data_tools.raw.format import RecordError
from data_tools.raw.recipe import raw_recipe
from data_tools.verify import folder_problems
from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from tests.support.conversations import write_images
from tests.support.tiny_data import BOS, EOS, text_rule, write_tokenizer

WORDS = st.text(st.characters(exclude_characters="<\n", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize("image", ["image", "image_path", "file_name"])
@pytest.mark.parametrize("text", ["caption", "text"])
def test_a_caption_follows_its_image(image: str, text: str) -> None:
    sample = read_caption({image: "a/1.jpg", text: "A bar.", "width": 3}, "unused")
    assert (sample.fields, sample.images) == ({"text": "<image>A bar."}, ["a/1.jpg"])


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(st.integers(0, 5), max_size=8))
def test_images_stand_before_their_texts(texts: list[str], places: list[int]) -> None:
    """Read back from the text alone: cut at its marks, every image is where its index says."""
    places = [place % len(texts) for place in places]
    infos = [{"image_name": f"{n}", "matched_text_index": place} for n, place in enumerate(places)]
    sample = read_interleaved({"text_list": texts, "image_info": infos}, "")
    images = iter(sample.images)
    for index, line in enumerate(sample.fields["text"].split("\n")):
        marks = line.count("<image>")
        assert line == "<image>" * marks + texts[index]
        assert [next(images) for _ in range(marks)] == [str(n) for n, p in enumerate(places) if p == index]
    assert list(images) == []


@pytest.mark.parametrize(
    ("read", "record", "cause"),
    [
        (read_caption, ["a.jpg", "A bar."], "not a record"),
        (read_caption, {"caption": "A bar."}, "unclear images"),
        (read_caption, {"image": "a.jpg", "file_name": "b.jpg", "caption": "A bar."}, "unclear images"),
        (read_caption, {"image": ["a.jpg"], "caption": "A bar."}, "unclear images"),
        (read_caption, {"image": "a.jpg"}, "no text"),
        (read_caption, {"image": "a.jpg", "caption": ["A bar."]}, "no text"),
        (read_caption, {"image": "a.jpg", "caption": "<image> A bar."}, "images do not match the marks"),
        (read_interleaved, {"image_info": []}, "no text"),
        (read_interleaved, {"text_list": ["a", 3]}, "no text"),
        (read_interleaved, {"text_list": ["a"], "image_info": {}}, "unclear images"),
        (read_interleaved, {"text_list": ["a"], "image_info": [{"image_name": "1.png"}]}, "unclear images"),
        (
            read_interleaved,
            {"text_list": ["a"], "image_info": [{"image_name": "1.png", "matched_text_index": 1}]},
            "unclear images",
        ),
        (read_interleaved, {"text_list": ["an <image>"]}, "images do not match the marks"),
        (read_text, {"content": "a"}, "no text"),
        (read_text, "a", "not a record"),
    ],
)
def test_a_record_that_cannot_be_used(read: Any, record: Any, cause: str) -> None:
    with pytest.raises(RecordError) as raised:
        read(record, "")
    assert raised.value.cause == cause


def of_folder(root: Path, folder: Path, **values: Any) -> DataConfig:
    """Captions of a folder of images."""
    raw = RawConfig(**{"format": "captions", "file": str(folder), "max_rejected_fraction": 0.3} | values)
    return DataConfig(
        name="mine",
        root=str(root),
        sources={"captions": SourceConfig(path=f"{root}/captions", modality="multimodal", raw=raw)},
        tokenizer=f"{folder.parent}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, two of them in a folder below; one has no caption."""
    names = write_images(tmp_path / "mine", 2) + [
        f"below/{name}" for name in write_images(tmp_path / "mine/below", 2)
    ]
    for name in names[:3]:
        (tmp_path / "mine" / name).with_suffix(".txt").write_text(f" Picture {name}.\n")
    (tmp_path / "mine" / "notes.md").write_text("no image")
    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path / "mine"


def test_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    config, told = of_folder(tmp_path / "data", folder), list[str]()
    assert build(raw_recipe(config), config, num_processes=1, report=told.append)
    assert list(folder_problems("captions", tmp_path / "data/captions", config)) == []
    assert any("1 x no text" in line and "below/1.png" in line for line in told), told
    samples = {}
    with tarfile.open(tmp_path / "data/captions/shard-000000.tar") as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            samples.setdefault(key, {})[name] = tar.extractfile(member).read()
    found = {
        json.loads(files["json"])["text"]: next(data for name, data in files.items() if name != "json")
        for files in samples.values()
    }
    names = ("0.jpg", "1.png", "below/0.jpg")
    assert found == {f"<image>Picture {name}.": (folder / name).read_bytes() for name in names}
    # Nothing has changed; then a caption has.
    assert not build(raw_recipe(config), config, num_processes=1, report=told.append)
    (folder / "0.txt").write_text("Another caption.")
    assert build(raw_recipe(config), config, num_processes=1, report=told.append)


@pytest.mark.parametrize("values", [{"format": "text"}, {"images": "."}])
def test_a_folder_without_records(values: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """For captions, one whose images lie elsewhere must have some."""
    with pytest.raises(UserError, match=r"captions\.raw\.file is .*mine, which holds no files of records"):
        raw_recipe(of_folder(tmp_path / "data", folder, **values)).parts()


def test_a_folder_without_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = of_folder(tmp_path / "data", folder, file=str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"captions\.raw\.file is .*empty, .* no images with captions"):
        build(raw_recipe(config), config, num_processes=1, report=lambda line: None)


def test_built_indexed_and_verified(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", 4)
    records: dict[str, list[dict[str, Any]]] = {
        "captions": [{"image": name, "caption": f"Picture {name}."} for name in names],
        "interleaved": [
            {
                "text_list": ["First.", "Second."],
                "image_info": [{"image_name": name, "matched_text_index": 1} for name in names[:count]],
            }
            for count in range(3)
        ],
        "text": [{"text": "A red bar. " * count} for count in range(1, 6)],
    }
    for name, of_format in records.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_format)))
    write_tokenizer(tmp_path / "tokenizer.json")
    root = tmp_path / "data"
    sources = {
        name: SourceConfig(
            path=f"{root}/{name}",
            modality="text" if name == "text" else "multimodal",
            raw=RawConfig(format=name, file=f"{tmp_path}/{name}.jsonl", images=f"{tmp_path}/images"),
        )
        for name in records
    }
    config = DataConfig(
        name="mine",
        root=str(root),
        sources=sources,
        tokenizer=f"{tmp_path}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
    )
    assert build(raw_recipe(config), config, num_processes=1, report=lambda line: None)
    rule = text_rule(tmp_path / "tokenizer.json")
    for name, of_format in records.items():
        assert list(folder_problems(name, root / name, config)) == []
        index = SourceIndex.open(root / name, rule, name=name)
        assert index.num_samples == len(of_format)
        assert (
            index.columns(0).num_images.tolist()
            == {"captions": [1] * 4, "interleaved": [0, 1, 2], "text": [0] * 5}[name]
        )
