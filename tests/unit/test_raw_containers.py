"""Records are the same whatever they come in; damaged, hostile and oversized ones are named."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import builder
from data_tools.builder import build
from data_tools.raw import joined, parquet
from data_tools.raw.documents import image_file
from data_tools.raw.format import RecordError
from data_tools.raw.joined import locate_annotations, locate_entries, locate_images
from data_tools.raw.parquet import locate_in_parquet
from data_tools.raw.recipe import raw_recipe
from data_tools.raw.tars import locate_in_tar
from data_tools.verify import folder_problems
from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError
from tests.support.tiny_data import BOS, EOS, picture, write_tokenizer

LIMIT = 1_000_000
FIELD = "data.sources.x.raw.file"
IMAGES = [picture(40, 30, seed=seed, file_format=("PNG", "JPEG")[seed % 2]) for seed in range(4)]
CAPTIONS = [f"Picture {number}." for number in range(4)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def map(self, function: Callable[..., Any], drafts: Sequence[Any], chunksize: int) -> Iterable[Any]:
            return map(function, drafts)

    monkeypatch.setattr(builder, "worker_pool", lambda num_processes: nullcontext(Pool()))


def built(folder: Path, **raw: Any) -> dict[str, list[bytes]]:
    """Build one source; its texts, or questions, with their images."""
    write_tokenizer(folder / "tokenizer.json")
    root = folder / "data"
    source = SourceConfig(path=f"{root}/x", modality="multimodal", raw=RawConfig(**raw))
    config = DataConfig(
        name="mine",
        root=str(root),
        sources={"x": source},
        tokenizer=f"{folder}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
        max_image_pixels=10_000,
    )
    told: list[str] = []
    build(raw_recipe(config), config, num_processes=1, report=told.append)
    assert list(folder_problems("x", root / "x", config)) == []
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(root / "x/shard-000000.tar") as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            samples.setdefault(key, {})[name] = tar.extractfile(member).read()
    found = {}
    for files in samples.values():
        fields = json.loads(files.pop("json"))
        text = fields.get("text") or fields["messages"][0]["content"]
        found[text] = [files[name] for name in sorted(files)]
    return found


def rejections(folder: Path) -> list[tuple[str, str, str]]:
    lines = (folder / "data/x/rejected.jsonl").read_text().splitlines()
    return [(one["cause"], one["where"], one["detail"]) for one in map(json.loads, lines)]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def as_img2dataset_tars(folder: Path) -> dict[str, Any]:
    """Two tars, with the parquet and the statistics that lie beside them."""
    for tar in range(2):
        files: dict[str, bytes] = {}
        for number in range(2 * tar, 2 * tar + 2):
            key = f"{tar:05d}{number:04d}"
            about = {"caption": CAPTIONS[number], "url": "http://x/1.jpg", "key": key, "status": "success"}
            files |= {
                f"{key}.jpg": IMAGES[number],
                f"{key}.json": json.dumps(about).encode(),
                f"{key}.txt": CAPTIONS[number].encode(),
            }
        write_tar(folder / f"{tar:05d}.tar", files)
        pq.write_table(pa.table({"caption": CAPTIONS, "url": CAPTIONS}), folder / f"{tar:05d}.parquet")
        (folder / f"{tar:05d}_stats.json").write_text('{"count": 2}')
    return {"file": str(folder)}


def as_img2dataset_files(folder: Path) -> dict[str, Any]:
    for number, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
        path = folder / f"{number // 2:05d}" / f"{number:09d}.jpg"  # an image's name does not say what it is
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        path.with_suffix(".txt").write_text(caption)
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))
    pq.write_table(pa.table({"caption": CAPTIONS}), folder / "00000.parquet")
    return {"file": str(folder)}


def as_img2dataset_parquet(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    pq.write_table(pa.table({"jpg": IMAGES, "caption": CAPTIONS}), folder / "00000.parquet", row_group_size=3)
    return {"file": f"{folder}/00000.parquet"}


def as_hugging_face_parquet(folder: Path) -> dict[str, Any]:
    """Two files with objects of bytes and path; a link, as its cache has them."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "data").mkdir()
    images = [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(IMAGES)]
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        table = pa.table({"image": images[rows], "text": CAPTIONS[rows]})
        pq.write_table(table, folder / f"blobs/{part}")
        (folder / f"data/train-{part}.parquet").symlink_to(folder / f"blobs/{part}")
    return {"file": f"{folder}/data"}


def as_parquet_of_names(folder: Path) -> dict[str, Any]:
    names = write_files(folder)
    pq.write_table(pa.table({"image_path": names, "caption": CAPTIONS}), folder / "x.parquet")
    return {"file": f"{folder}/x.parquet", "images": f"{folder}/images"}


def as_coco(folder: Path) -> dict[str, Any]:
    """Of the last image there are two captions; annotations come first, and not in the order of images."""
    names = write_files(folder)
    content = {
        "annotations": [
            {"id": 9 - number, "image_id": 100 + number, "caption": f"{CAPTIONS[number]} "}
            for number in (3, 0, 2, 1)
        ],
        "licenses": [{"id": 1}],
        "images": [
            {"license": 1, "file_name": name, "id": 100 + number} for number, name in enumerate(names)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content, indent=1))
    return {"file": f"{folder}/captions.json", "images": f"{folder}/images"}


def as_jsonl_files(folder: Path) -> dict[str, Any]:
    names = write_files(folder)
    (folder / "records").mkdir()
    for number, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True)):
        record = {"id": number, "image": name, "blip_caption": caption}
        (folder / f"records/{number}.jsonl").write_text(json.dumps(record))
    return {"file": f"{folder}/records", "images": f"{folder}/images"}


def write_files(folder: Path) -> list[str]:
    (folder / "images/a").mkdir(parents=True)
    names = [f"a/{number}.png" for number in range(len(IMAGES))]
    for name, image in zip(names, IMAGES, strict=True):
        (folder / "images" / name).write_bytes(image)
    return names


@pytest.mark.parametrize(
    "write",
    [
        as_img2dataset_tars,
        as_img2dataset_files,
        as_img2dataset_parquet,
        as_hugging_face_parquet,
        as_parquet_of_names,
        as_coco,
        as_jsonl_files,
    ],
)
def test_captions_in_any_container(write: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    found = built(tmp_path, format="captions", **write(tmp_path / "raw"))
    expected = zip(CAPTIONS, IMAGES, strict=True)
    assert found == {f"<image>{caption}": [image] for caption, image in expected}


def test_conversations_in_parquet_and_tar(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A bar."}]
    pq.write_table(pa.table({"images": [[IMAGES[0]]], "conversations": [turns]}), tmp_path / "a/x.parquet")
    assert built(tmp_path / "a", file=f"{tmp_path}/a/x.parquet") == {"<image>What?": [IMAGES[0]]}
    turns[0]["value"] = "<image><image>Which?"
    content = json.dumps({"conversations": turns}).encode()
    write_tar(tmp_path / "b/x.tar", {"k.0.png": IMAGES[0], "k.1.jpg": IMAGES[1], "k.json": content})
    assert built(tmp_path / "b", file=f"{tmp_path}/b/x.tar") == {"<image><image>Which?": IMAGES[:2]}


def test_obelics(tmp_path: Path) -> None:
    """Images by address are files named by its hash; bytes and names are taken as they are."""
    address = "https://example.org/a.jpg?x=1"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / image_file(address)).write_bytes(IMAGES[0])
    (tmp_path / "images/b.png").write_bytes(IMAGES[2])
    record = {
        "images": [None, address, None, "b.png"],
        "texts": ["Sales rose.", None, "Costs fell.", None],
        "metadata": json.dumps([None, {"document_url": "https://example.org"}, None, None]),
        "general_metadata": "{}",
    }
    missing = {**record, "images": [None, "https://example.org/c.jpg", None, "b.png"]}
    pq.write_table(pa.Table.from_pylist([record, missing]), tmp_path / "x.parquet")
    files = {"file": f"{tmp_path}/x.parquet", "images": f"{tmp_path}/images"}
    found = built(tmp_path, format="interleaved", **files, max_rejected_fraction=0.5)
    assert found == {"Sales rose.\n<image>\nCosts fell.\n<image>": [IMAGES[0], IMAGES[2]]}
    ((cause, where, _),) = rejections(tmp_path)
    assert (cause, where) == ("missing image", f"row 1 of {tmp_path}/x.parquet")


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_every_row_is_read_once(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.parquet"
    table = pa.table({"number": list(range(sum(sizes)))})
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    rows = locate_in_parquet(path, FIELD, LIMIT)
    assert [row.read(path, LIMIT)["number"] for row in rows] == list(range(sum(sizes)))
    assert [row.number for row in rows[::-1]] == list(range(sum(sizes)))[::-1]


TAR_NAMES = st.lists(
    st.from_regex(r"([a-z]{1,3}/)?[a-z]{1,8}", fullmatch=True), min_size=1, max_size=6, unique=True
)


@given(keys=TAR_NAMES, sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_every_record_of_a_tar_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    files = {
        f"{key}.{number}.png": bytes([number]) * size for key in keys for number, size in enumerate(sizes)
    }
    notes = {f"{key}.json": json.dumps({"key": key}).encode() for key in keys}
    ordered = {
        name: (files | notes)[name] for key in keys for name in (files | notes) if name.split(".")[0] == key
    }
    write_tar(path, ordered)
    records = [place.read(path, LIMIT) for place in locate_in_tar(path, FIELD, LIMIT)]
    assert [record["key"] for record in records] == keys
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    assert [record.get("images", [record.get("image")]) for record in records] == [contents] * len(keys)


@given(
    image_of=st.lists(st.integers(0, 4), max_size=12),
    is_list=st.booleans(),
    images_first=st.booleans(),
    chunk=st.sampled_from([1, 7, 1 << 22]),
)
@settings(max_examples=40, deadline=None)
def test_images_are_joined_with_their_annotations(
    tmp_path_factory: pytest.TempPathFactory,
    image_of: list[int],
    is_list: bool,
    images_first: bool,
    chunk: int,
) -> None:
    """As COCO has them, in lists, and as TextOCR does, in objects by name."""
    path = tmp_path_factory.mktemp("joined") / "x.json"
    images: Any = [{"id": f"图{number}", "file_name": f"{number}.jpg"} for number in range(5)]
    annotations: Any = [{"id": n, "image_id": f"图{image}"} for n, image in enumerate(image_of)]
    names = ("images", "annotations")
    if not is_list:
        names = ("imgs", "anns")
        images = {image["id"]: image for image in images}
        annotations = {str(annotation["id"]): annotation for annotation in annotations}
    lists = {names[0]: images, names[1]: annotations}
    content = lists if images_first else dict(reversed(lists.items()))
    path.write_text(json.dumps({"info": {"year": 1}, **content, "imgToAnns": {"a": [1]}}, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.raw.json_text.CHUNK", chunk)
        by_image = [place.read(path, LIMIT) for place in locate_images(path, FIELD, LIMIT)]
        by_annotation = [place.read(path, LIMIT) for place in locate_annotations(path, FIELD, LIMIT)]
    expected = {
        f"{image}.jpg": [n for n, of in enumerate(image_of) if of == image] for image in sorted(set(image_of))
    }
    assert {one["file_name"]: [a["id"] for a in one["annotations"]] for one in by_image} == expected
    pairs = [(one["file_name"], [a["id"] for a in one["annotations"]]) for one in by_annotation]
    assert pairs == [(name, [number]) for name, numbers in expected.items() for number in numbers]


def test_entries_of_an_object(tmp_path: Path) -> None:
    content = {"gt_0": [{"a": "]}"}], 'gt "1"': [], "图": {"b": [1]}}
    for number, text in enumerate([json.dumps(content), json.dumps(content, indent=2, ensure_ascii=False)]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        entries = [place.read(path, LIMIT) for place in locate_entries(path, FIELD, LIMIT)]
        assert entries == [{key: value} for key, value in content.items()]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"images": [{"id": 1}]', "ends at byte 22.* cut off"),
        ('{"images": [{"id": 1}]}', "must have images or imgs, and annotations or anns"),
        ('{"images": [{"name": 1}], "annotations": []}', "what lies at byte 12 has no id"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 2}]}',
            "of image 2, which is none of its images",
        ),
        ('{"images": [{"id": 1}], "annotations": []} x', "after the object there is more, at byte 43"),
        ('{"images": [{"id": 1}], "annotations": []}', "holds no records"),
    ],
)
def test_a_broken_object_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=rf"raw\.file .*x\.json.*{complaint}"):
        built(tmp_path, format="captions", file=f"{tmp_path}/x.json")


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_an_image_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Though it is there."""
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(IMAGES[0])
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"image": image, "caption": "A."}) for image in ("0.png", name))
    )
    files = {"file": f"{tmp_path}/x.jsonl", "images": f"{tmp_path}/images"}
    assert built(tmp_path, format="captions", **files, max_rejected_fraction=0.5) == {
        "<image>A.": [IMAGES[0]]
    }
    ((cause, where, detail),) = rejections(tmp_path)
    assert (cause, where) == ("image outside its folder", f"record 1 of {tmp_path}/x.jsonl")
    assert name in detail


def test_a_linked_folder_of_images_is_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.png").write_bytes(IMAGES[0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/coco").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "coco/0.png", "caption": "A."}))
    files = {"file": f"{tmp_path}/x.jsonl", "images": f"{tmp_path}/images"}
    assert built(tmp_path, format="captions", **files) == {"<image>A.": [IMAGES[0]]}


def huge_png() -> bytes:
    """One pixel, whose header says 60,000 x 60,000."""
    data = bytearray(picture(1, 1))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("key", "files", "cause", "detail"),
    [
        ("../x", {"txt": b"A.", "jpg": IMAGES[1]}, "unsafe name", "'../x.txt' leads out"),
        ("/x", {"txt": b"A.", "jpg": IMAGES[1]}, "unsafe name", "'/x.txt' leads out"),
        ("x", {"txt": b"A.", "jpg": huge_png()}, "image beyond the pixel limit", "60000 x 60000 pixels"),
        ("x", {"txt": b"A.", "jpg": b"no image"}, "image cannot be decoded", "image 0"),
        ("x", {"txt": b"\xff\xfe", "jpg": IMAGES[1]}, "no text", "no UTF-8"),
        ("x", {"json": b"{", "jpg": IMAGES[1]}, "invalid JSON", "Expecting"),
        ("x", {"json": b"[]", "jpg": IMAGES[1]}, "not a record", "list"),
        ("x", {"jpg": IMAGES[1]}, "no text", "caption"),
        ("x", {"txt": b"A."}, "unclear images", "must name one image"),
    ],
)
def test_a_bad_record_of_a_tar(
    tmp_path: Path, key: str, files: dict[str, bytes], cause: str, detail: str
) -> None:
    good = {"good.txt": b"Good.", "good.jpg": IMAGES[1]}
    write_tar(tmp_path / "x.tar", good | {f"{key}.{name}": data for name, data in files.items()})
    found = built(tmp_path, format="captions", file=f"{tmp_path}/x.tar", max_rejected_fraction=0.5)
    assert found == {"<image>Good.": [IMAGES[1]]}
    ((found_cause, where, found_detail),) = rejections(tmp_path)
    assert (found_cause, where) == (cause, f"record 1 of {tmp_path}/x.tar")
    assert detail in found_detail


def test_a_large_record_of_a_tar_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.txt": bytes(5000), "b.txt": b"B."})
    large, small = locate_in_tar(tmp_path / "x.tar", FIELD, 3000)
    with pytest.raises(RecordError, match="record too large"):
        large.read(tmp_path / "x.tar", 3000)
    assert small.read(tmp_path / "x.tar", 3000) == {"text": "B."}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.txt": b"A." * 900})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:700])
    with pytest.raises(UserError, match=r"x\.tar"):
        built(tmp_path, format="captions", file=f"{tmp_path}/x.tar")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"x\.raw\.file has .*x\.parquet, which cannot be read as parquet"):
        built(tmp_path, format="text", file=f"{tmp_path}/x.parquet")


def test_a_damaged_page_of_parquet_is_its_rows_own(tmp_path: Path) -> None:
    texts = [f"text {number} " * 20 for number in range(4)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=2, compression="snappy", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    found = built(tmp_path, format="text", file=str(path), max_rejected_fraction=0.5)
    assert list(found) == texts[:2]
    assert [cause for cause, _, _ in rejections(tmp_path)] == ["broken parquet"] * 2


def test_sizes_of_parquet_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a" * 3000, "b"]}), path)
    large, small = locate_in_parquet(path, FIELD, 1000)
    with pytest.raises(RecordError, match="record too large"):
        large.read(path, 1000)
    assert small.read(path, 1000) == {"text": "b"}
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match=r"row group 0 has .* write it with smaller row groups"):
        locate_in_parquet(path, FIELD, 1000)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"x\.csv; a file of \.tar, \.parquet, \.jsonl, \.json is needed"):
        built(tmp_path, format="text", file=f"{tmp_path}/x.csv")


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.json"])
def test_a_changed_file_is_another_version(name: str, tmp_path: Path) -> None:
    def version() -> str:
        source = SourceConfig(
            path="/d/x", modality="multimodal", raw=RawConfig(format="captions", file=str(tmp_path))
        )
        return raw_recipe(DataConfig(root="/d", sources={"x": source})).version

    (tmp_path / name).write_bytes(b"a")
    before = version()
    assert version() == before
    (tmp_path / name).write_bytes(b"bb")
    assert version() != before


def test_no_object_of_names_is_taken_for_lists(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"gt_0": []}')
    (tmp_path / "b.json").write_text('{"cats": {}}')
    assert not joined.has_lists(tmp_path / "a.json", LIMIT)
    assert joined.has_lists(tmp_path / "b.json", LIMIT)
