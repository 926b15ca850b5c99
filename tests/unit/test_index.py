"""Building the index: counts and places against what was written, and shards that are damaged."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import IndexSummary, build_index
from megatron_vl.data.sample import SampleError, parse_sample
from megatron_vl.data.shard_reader import ShardReader
from megatron_vl.data.source_table import source_table
from megatron_vl.data.text import TextRule
from megatron_vl.data.types import MULTIMODAL
from tests.support.tiny_data import Samples, mixed_samples, picture, text_rule, write_source, write_tokenizer


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> TextRule:
    return text_rule(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def index_folder(folder: Path, rule: TextRule, **options: Any) -> IndexSummary:
    return build_index(folder, rule, max_sample_bytes=100_000, **options)


def open_index(folder: Path, rule: TextRule, **options: Any) -> SourceIndex:
    return SourceIndex.open(folder, rule, name="captions", **options)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_are_the_samples_in_order(tmp_path: Path, rule: TextRule, num_processes: int) -> None:
    samples = mixed_samples()
    write_source(tmp_path, samples, max_samples=3)
    progress: list[tuple[int, int]] = []
    summary = index_folder(
        tmp_path, rule, num_processes=num_processes, on_shard=lambda *counts: progress.append(counts)
    )
    index = open_index(tmp_path, rule)
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert index.num_samples == summary.num_samples == len(samples)
    assert index.first_samples.tolist() == [0, 3, 6]
    assert [shard.num_samples for shard in index.shards()] == [3, 3, len(samples) - 6]
    assert index.num_images == summary.num_images == sum(len(images) for _, images in samples.values())
    assert index.num_text_tokens == summary.num_text_tokens
    reader = ShardReader()
    tokens = ImageTokens(tokens_per_image=5)
    positions, num_images = source_table(index, MULTIMODAL, tokens).read(0, index.num_samples)
    for row, (key, (fields, images)) in enumerate(samples.items()):
        location = index.locate(row)
        assert (index.key(row), location.key) == (key, key)
        data = reader.read(location, location.text)
        assert json.loads(data) == fields
        files = list(images.values())
        assert [reader.read(location, member) for member in location.images] == files
        assert num_images[row] == len(images)
        assert [tuple(size) for size in location.image_sizes] == [png_or_jpeg_size(file) for file in files]
        sequence = rule.encode(parse_sample(data, key, "shard", 10_000), [5] * len(images)).tokens
        assert positions[row] == len(sequence) - 1
        assert location.num_text_tokens == len(sequence) - 1 - 5 * len(images)


def png_or_jpeg_size(data: bytes) -> tuple[int, int]:
    if data.startswith(b"\x89PNG"):
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    frame = data.index(b"\xff\xc0")
    return int.from_bytes(data[frame + 7 : frame + 9]), int.from_bytes(data[frame + 5 : frame + 7])


def test_an_index_does_not_depend_on_where_or_how_often_it_is_made(tmp_path: Path, rule: TextRule) -> None:
    digests = []
    for name in ("a", "b"):
        write_source(tmp_path / name, mixed_samples(), max_samples=3)
        for num_processes in (1, 2):
            index_folder(tmp_path / name, rule, num_processes=num_processes)
            digests.append(open_index(tmp_path / name, rule).digest)
    write_source(tmp_path / "c", mixed_samples(6), max_samples=3)
    index_folder(tmp_path / "c", rule)
    assert len(set(digests)) == 1
    assert open_index(tmp_path / "c", rule).digest != digests[0]


def repack(
    shard: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], **options: Any
) -> None:
    """The shard with its members changed."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(shard, "w", **options) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Two samples of one image each, three files of text: 2 x (image, json), 3 x json."""
    samples: Samples = {f"i{n}": ({"text": "<image>a"}, {"0.png": picture(seed=n)}) for n in range(2)}
    write_source(tmp_path, samples | {f"t{n}": ({"text": f"document {n}"}, {}) for n in range(3)})
    return tmp_path / "shard-000000.tar"


def test_shards_of_other_tar_tools_are_read(shard: Path, rule: TextRule) -> None:
    """Folders, extended headers and names beyond ustar's hundred characters."""
    long_folder = "folder" * 20

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for info, _ in members:
            info.name = f"{long_folder}/{info.name}"
            info.pax_headers = {"mtime": "1.5", "comment": "é"}
        folder = tarfile.TarInfo(long_folder)
        folder.type = tarfile.DIRTYPE
        members.insert(0, (folder, b""))

    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        repack(shard, change, format=tar_format)
        assert index_folder(shard.parent, rule).num_samples == 5
        assert open_index(shard.parent, rule).key(4).endswith("/t2")


def test_a_shard_truncated_anywhere_is_refused(shard: Path, rule: TextRule) -> None:
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in [*range(0, end + 512, 100), end // 512 * 512 + 512]:
        shard.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{shard}"):
            index_folder(shard.parent, rule)


@given(data=st.data())
@settings(max_examples=100)
def test_a_damaged_shard_is_refused_or_all_its_samples_are_there(
    tmp_path_factory: pytest.TempPathFactory, rule: TextRule, data: st.DataObject
) -> None:
    """Random bytes anywhere: no sample is dropped without a word."""
    folder = tmp_path_factory.mktemp("damaged")
    write_source(folder, {f"k{i}": ({"text": f"document {i}"}, {}) for i in range(6)})
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start = data.draw(st.integers(0, 6 * 1024))
    garbage = data.draw(st.binary(min_size=1, max_size=600))
    content[start : start + len(garbage)] = garbage
    shard.write_bytes(content)
    complaint = ""
    try:
        num_samples = index_folder(folder, rule).num_samples
    except UserError as error:
        complaint = str(error)
    assert str(shard) in complaint or num_samples == 6


@pytest.mark.parametrize("header", [b"\xaa" * 512, b"\0" * 512])
def test_a_garbage_header_in_the_middle_is_named_with_its_byte(
    shard: Path, rule: TextRule, header: bytes
) -> None:
    """Where tarfile and webdataset end in silence."""
    with tarfile.open(shard) as tar:
        offset = tar.getmember("t1.json").offset
    content = bytearray(shard.read_bytes())
    content[offset : offset + 512] = header
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"shard {shard} is damaged at byte {offset}"):
        index_folder(shard.parent, rule)


def without(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    return lambda members: members.__setitem__(
        slice(None), [each for each in members if each[0].name != name]
    )


def with_file(
    name: str, data: bytes = b"x", **changes: Any
) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    info = tarfile.TarInfo(name)
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return lambda members: members.append((info, data))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            without("i1.0.png"),
            r"sample 'i1' in .*shard-000000.tar: images do not match the marks: 1 <image> marks",
        ),
        (without("i1.json"), r"sample 'i1' in .*: no JSON: i1.json must lie beside 0.png"),
        (with_file("t2.0.png"), r"sample 't2' .*: images do not match the marks: 0 <image> marks.*\[0\]"),
        (with_file("i0.1.png"), r"sample 'i0' .*: duplicate key"),
        (with_file("t2.json"), r"sample 't2' .*: duplicate file: t2.json"),
        (with_file("t2.txt"), r"sample 't2' .*: unexpected file: txt"),
        (with_file("new.json", b"{}"), r"sample 'new' .*: invalid sample"),
        (
            with_file("new.json", b"{" * 100_001),
            r"sample 'new' .*: sample too large: 100001 bytes; data.max_sample_b",
        ),
        (
            with_file("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            r"'link' at byte \d+ is no regular",
        ),
    ],
)
def test_a_bad_sample_is_named(shard: Path, rule: TextRule, change: Any, complaint: str) -> None:
    repack(shard, change)
    with pytest.raises(UserError, match=complaint):
        index_folder(shard.parent, rule)


def test_an_error_of_another_process_arrives(shard: Path, rule: TextRule) -> None:
    write_source(shard.parent / "b", {"a": ({"text": "x"}, {})})
    repack(shard, with_file("t2.txt"))
    shard.rename(shard.parent / "b" / "shard-000001.tar")
    with pytest.raises(SampleError, match="sample 't2'"):
        index_folder(shard.parent / "b", rule, num_processes=2)


def test_an_image_that_cannot_be_read_is_counted_not_refused(shard: Path, rule: TextRule) -> None:
    def spoil(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0] = (members[0][0], b"no image")

    repack(shard, spoil)
    assert index_folder(shard.parent, rule).num_unreadable_images == 1
    assert open_index(shard.parent, rule).columns(0).image_sizes.tolist() == [[0, 0], [20, 12]]


def test_empty_folders_and_shards_are_named(tmp_path: Path, rule: TextRule) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} holds no shards"):
        index_folder(tmp_path, rule)
    shard = tmp_path / "shard-000000.tar"
    shard.touch()
    with pytest.raises(UserError, match=f"shard {shard} is empty"):
        index_folder(tmp_path, rule)
    tarfile.open(shard, "w").close()
    with pytest.raises(UserError, match=f"shard {shard} is empty: it holds no sample"):
        index_folder(tmp_path, rule)
