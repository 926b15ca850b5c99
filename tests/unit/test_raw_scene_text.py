"""Words of scenes are read in order, from every layout; what cannot be read is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.raw.format import Material, RawSample, RecordError
from data_tools.raw.reading_order import Word, in_reading_order
from data_tools.raw.scene_text import FORMAT, read_scene_text
from megatron_vl.config.data import RawConfig
from megatron_vl.config.errors import UserError
from tests.support.tiny_data import picture

# What every layout below says: two lines, and a word that nobody can read.
WORDS = [("2024", 70, 12), ("###", 10, 60), ("Sales", 10, 10), ("图表", 30, 40)]
TEXT = "<image>Sales 2024\n图表"


def quad(left: int, top: int) -> list[list[int]]:
    return [[left, top], [left + 40, top], [left + 40, top + 20], [left, top + 20]]


def flat(left: int, top: int) -> list[int]:
    return [one for point in quad(left, top) for one in point]


def material(file: Path, images: Path | None = None) -> Material:
    return Material(
        source="x",
        raw=RawConfig(format="scene_text", file=str(file), images=str(images or "")),
        image_folder=images or file,
        modality="multimodal",
        has_heldout=False,
        max_sample_bytes=100_000,
        max_image_pixels=10_000,
    )


def read(of: Material) -> list[RawSample]:
    return [sample for draft in FORMAT.drafts(of, "field") for sample in FORMAT.read(of, draft)]


def truth(folder: Path, line: str, name: str = "gt_img_1.txt") -> Material:
    """ICDAR: a file of lines for each image."""
    (folder / "truths").mkdir()
    (folder / "images").mkdir()
    (folder / "images/img_1.jpg").write_bytes(picture())
    lines = [
        line.format(
            points=",".join(map(str, flat(left, top))),
            text=text,
            left=left,
            top=top,
            right=left + 40,
            bottom=top + 20,
        )
        for text, left, top in WORDS
    ]
    (folder / "truths" / name).write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8-sig")
    return material(folder / "truths", folder / "images")


@pytest.mark.parametrize(
    "line",
    [
        "{points},{text}",  # 2015
        "{points},Latin,{text}",  # MLT
        '{points},0,"{text}"',  # RCTW
        '{left}, {top}, {right}, {bottom}, "{text}"',  # 2013
    ],
)
def test_icdar(line: str, tmp_path: Path) -> None:
    (sample,) = read(truth(tmp_path, line))
    assert (sample.fields, list(sample.images)) == ({"text": TEXT}, ["img_1.jpg"])


@pytest.mark.parametrize("text", ["12, rue Latin", "Latin", '"', "a,b,c", "1,5"])
def test_a_text_may_look_like_other_columns(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_text(f"0,0,9,0,9,9,0,9,{text}")
    assert read(material(tmp_path))[0].fields == {"text": f"<image>{text}"}


def test_truths_beside_their_images(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/7.png").write_bytes(picture())
    (tmp_path / "below/7.txt").write_text("0,0,9,0,9,9,0,9,Exit")
    (sample,) = read(material(tmp_path))
    assert (sample.fields, list(sample.images)) == ({"text": "<image>Exit"}, ["below/7.png"])


@pytest.mark.parametrize("name", ["train_full_labels.json", "labels.jsonl"])
def test_lsvt_and_art(name: str, tmp_path: Path) -> None:
    words = [
        {"transcription": text, "points": quad(left, top), "illegibility": text == "###"}
        for text, left, top in WORDS
    ]
    other = {"gt_1.png": words[2:]}
    entries = {"gt_0": words} | other
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(entries))
    else:
        (tmp_path / name).write_text(f"{json.dumps({'gt_0': words})}\n{json.dumps(other)}")
    first, second = read(material(tmp_path / name))
    assert (first.fields, list(first.images)) == ({"text": TEXT}, ["gt_0.jpg"])
    assert list(second.images) == ["gt_1.png"]


def test_coco_text_and_textocr(tmp_path: Path) -> None:
    """A dot, a mark of its own and a field each say that a word is illegible."""
    more = [("gone", 10, 80), (".", 10, 90)]
    annotations = {
        f"a_{number}": {
            "id": f"a_{number}",
            "image_id": "a",
            "bbox": [left, top, 40, 20],
            "utf8_string": text,
            "legibility": "illegible" if text == "gone" else "legible",
        }
        for number, (text, left, top) in enumerate(WORDS + more)
    }
    content = {
        "info": {},
        "imgs": {
            "a": {"id": "a", "file_name": "train/a.jpg", "width": 9},
            "b": {"id": "b", "file_name": "b.jpg"},
        },
        "anns": annotations,
        "imgToAnns": {"a": list(annotations), "b": []},
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    (sample,) = read(material(tmp_path / "x.json"))
    assert (sample.fields, list(sample.images)) == ({"text": TEXT}, ["train/a.jpg"])


def test_paddle(tmp_path: Path) -> None:
    words = [{"transcription": text, "points": quad(left, top)} for text, left, top in WORDS]
    line = f"imgs/1.jpg\t{json.dumps(words, ensure_ascii=False)}\n"
    (tmp_path / "Label.txt").write_text(line + "\n" + line + "imgs/2.jpg without a tab\n")
    of = material(tmp_path / "Label.txt", tmp_path)
    drafts = FORMAT.drafts(of, "field")
    assert [str(draft) for draft in drafts] == ["line 0", "line 1", "line 2"]
    for draft in drafts[:2]:
        (sample,) = FORMAT.read(of, draft)
        assert (sample.fields, list(sample.images)) == ({"text": TEXT}, ["imgs/1.jpg"])
    with pytest.raises(RecordError, match="after a name and a tab"):
        FORMAT.read(of, drafts[2])
    (tmp_path / "Label.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no records"):
        FORMAT.drafts(of, "field")


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"image": "a.jpg"}, "no text"),
        ({"image": "a.jpg", "words": [{"transcription": "###", "bbox": [0, 0, 1, 1]}]}, "no text"),
        ({"image": "a.jpg", "words": [{"transcription": "a"}]}, "no box"),
        ({"image": "a.jpg", "words": [{"transcription": "a", "bbox": [0, 1]}]}, "no box"),
        ({"image": "a.jpg", "words": [{"transcription": "a", "points": [["x", 1]]}]}, "no box"),
        ({"image": "a.jpg", "words": ["a"]}, "not a record"),
        ({"image": "a.jpg", "words": {"a": 1}}, "no text"),
        ({"words": [{"text": "a", "bbox": [0, 0, 1, 1]}], "id": 1}, "unclear images"),
        (
            {"image": "a.jpg", "words": [{"text": "<image>", "bbox": [0, 0, 1, 1]}]},
            "images do not match the marks",
        ),
        (["a"], "not a record"),
    ],
)
def test_what_cannot_be_used_has_a_cause(record: Any, cause: str) -> None:
    with pytest.raises(RecordError) as raised:
        read_scene_text(record, "")
    assert raised.value.cause == cause


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"a.txt": b"0,0,9,0,9,9,0,9,Exit"}, "missing image"),
        ({"a.png": picture(), "a.txt": b"Exit"}, "no box"),
        ({"a.png": picture(), "a.txt": b"\xff"}, "no text"),
        ({"a.png": picture(), "a.txt": b""}, "no text"),
    ],
)
def test_a_bad_truth(files: dict[str, bytes], cause: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordError) as raised:
        read(material(tmp_path))
    assert raised.value.cause == cause


def test_the_digest_knows_the_truths(tmp_path: Path) -> None:
    of = truth(tmp_path, "{points},{text}")
    before = FORMAT.digest(of)
    (tmp_path / "truths/gt_img_1.txt").write_text("0,0,9,0,9,9,0,9,Exit")
    assert FORMAT.digest(of) != before


@given(
    lines=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    slope=st.integers(-4, 4),
    order=st.randoms(use_true_random=False),
)
def test_lines_are_found_whatever_the_order(lines: list[int], slope: int, order: Any) -> None:
    """Lines of 20 pixels with gaps of 10; a word may lie up to 4 pixels off its line."""
    words = [
        Word(
            text=f"{row} {column}",
            left=50 * column,
            top=30 * row + slope * (column % 2),
            bottom=30 * row + 20,
        )
        for row, length in enumerate(lines)
        for column in range(length)
    ]
    shuffled = list(words)
    order.shuffle(shuffled)
    found = [[word.text for word in line] for line in in_reading_order(shuffled)]
    assert found == [[f"{row} {column}" for column in range(length)] for row, length in enumerate(lines)]
