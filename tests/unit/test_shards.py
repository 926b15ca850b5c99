"""Shards: what is written is what is read, by us and by webdataset; nothing half-written stays."""

import concurrent.futures
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import SampleError
from megatron_vl.data.shard_index import Location, Member
from megatron_vl.data.shard_reader import ShardReader
from megatron_vl.data.shards import ShardWriter
from megatron_vl.data.tar import walk_tar
from tests.support.tiny_data import picture, write_source

KEYS = st.lists(
    st.from_regex(r"([A-Za-z0-9_-]{1,9}/){0,4}[A-Za-z0-9_-]{1,40}", fullmatch=True), min_size=1, unique=True
)


@given(keys=KEYS, max_samples=st.integers(1, 3), images=st.lists(st.binary(max_size=1500), max_size=12))
@settings(max_examples=40)
def test_samples_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], max_samples: int, images: list[bytes]
) -> None:
    """Written by us; read by webdataset, and by our walk and reader."""
    folder = tmp_path_factory.mktemp("source")
    fields = {"text": "图<image>" * len(images) + "."}
    files = {f"{number}.png": image for number, image in enumerate(images)}
    write_source(folder, dict.fromkeys(keys, (fields, files)), max_samples=max_samples)
    shards = sorted(folder.iterdir())
    assert [shard.name for shard in shards] == [
        f"shard-{i:06d}.tar" for i in range(-(-len(keys) // max_samples))
    ]

    read = [sample for shard in shards for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert [sample["__key__"] for sample in read] == keys
    for sample in read:
        assert json.loads(sample["json"]) == fields
        assert {
            name: sample[name] for name in sample if not name.startswith("__") and name != "json"
        } == files

    contents = {}
    for shard in shards:
        with shard.open("rb") as file:
            for member in walk_tar(shard, file):
                where = Member(offset=member.offset, size=member.size)
                contents[member.name] = ShardReader().read(location(shard), where)
    assert contents == {f"{key}.{name}": data for key in keys for name, data in files.items()} | {
        f"{key}.json": json.dumps(fields, ensure_ascii=False).encode() for key in keys
    }


def location(shard: Path, shard_bytes: int | None = None) -> Location:
    nowhere = Member(offset=0, size=0)
    size = shard.stat().st_size if shard_bytes is None else shard_bytes
    return Location(
        shard=str(shard),
        shard_bytes=size,
        key="k",
        text=nowhere,
        images=(),
        num_text_tokens=0,
        image_sizes=np.zeros((0, 2), dtype=np.int32),
    )


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    samples: dict[str, Any] = {
        f"k{i}": ({"text": f"<image>{i}"}, {"0.png": picture(seed=i)}) for i in range(5)
    }
    for name in ("a", "b"):
        write_source(tmp_path / name, samples, max_samples=2)
    for first, second in zip(
        sorted((tmp_path / "a").iterdir()), sorted((tmp_path / "b").iterdir()), strict=True
    ):
        assert first.read_bytes() == second.read_bytes()
    with tarfile.open(tmp_path / "a/shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


def test_a_shard_is_full_at_its_size(tmp_path: Path) -> None:
    write_source(tmp_path, {f"k{i}": ({"text": "x" * 3000}, {}) for i in range(6)}, max_bytes=10_000)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    def write_three() -> None:
        with ShardWriter(tmp_path, max_samples=2) as writer:
            for key in ("a", "b", "c"):
                writer.write(key, {"text": "x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_three()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_no_shard_bears_its_name_before_it_is_complete(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"text": "x"})
        assert not list(tmp_path.glob("*.tar"))
    assert list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(
    ("key", "fields", "images", "complaint"),
    [
        ("a.b", {"text": "x"}, {}, "invalid key"),
        ("", {"text": "x"}, {}, "invalid key"),
        ("a/", {"text": "x"}, {}, "invalid key"),
        ("k" * 81, {"text": "x"}, {}, "invalid key"),
        ("first", {"text": "x"}, {}, "duplicate key"),
        ("a", {"text": "<image>"}, {}, "images do not match"),
        ("a", {"text": "x"}, {"0.png": b""}, "images do not match"),
        ("a", {"text": "x\ud800"}, {}, "lone surrogate|invalid JSON"),
        ("a", {"text": "x" * 2000}, {}, "sample too large"),
    ],
)
def test_a_bad_sample_is_not_written(
    tmp_path: Path, key: str, fields: dict[str, Any], images: dict[str, bytes], complaint: str
) -> None:
    with ShardWriter(tmp_path, max_sample_bytes=1000) as writer:
        writer.write("first", {"text": "x"})
        with pytest.raises(SampleError, match=complaint):
            writer.write(key, fields, images)
        writer.write("last", {"text": "x"})
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == ["first.json", "last.json"]


def test_shards_are_never_added_to_a_folder_that_has_some(tmp_path: Path) -> None:
    write_source(tmp_path, {"a": ({"text": "x"}, {})})
    with pytest.raises(UserError, match=f"{tmp_path} has 1 shards already"):
        ShardWriter(tmp_path)


def test_a_changed_missing_or_short_shard_is_named(tmp_path: Path) -> None:
    write_source(tmp_path, {"a": ({"text": "x"}, {})})
    shard = tmp_path / "shard-000000.tar"
    size = shard.stat().st_size
    beyond = Member(offset=size - 4, size=8)
    with pytest.raises(UserError, match=f"shard {shard} ends before byte {size + 4}"):
        ShardReader().read(location(shard), beyond)
    with pytest.raises(UserError, match=f"shard {shard} has {size} bytes, its index says 7"):
        ShardReader().read(location(shard, shard_bytes=7), beyond)
    with pytest.raises(UserError, match=r"gone.tar cannot be read: No such file"):
        ShardReader().read(location(tmp_path / "gone.tar", shard_bytes=size), beyond)


def test_few_files_stay_open_and_threads_never_lose_theirs(tmp_path: Path) -> None:
    """Many threads, more shards than may be open: a file evicted while it is read must stay readable."""
    num_shards = 12
    write_source(tmp_path, {f"k{i}": ({"text": f"{i:04d}"}, {}) for i in range(num_shards)}, max_samples=1)
    shards = sorted(tmp_path.iterdir())
    readers = [ShardReader(max_open_files=2)]

    def read(number: int) -> str:
        data = readers[0].read(location(shards[number % num_shards]), Member(offset=512, size=16))
        return str(json.loads(data)["text"])

    def num_open() -> int:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(link.parent == tmp_path for link in links)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(read, range(2000)))
    assert texts == [f"{number % num_shards:04d}" for number in range(2000)]
    assert num_open() == 2
    readers.clear()
    assert num_open() == 0
