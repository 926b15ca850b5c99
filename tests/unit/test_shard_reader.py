"""Members of remote shards are those of the same shards on disk, and cost about the bytes that are used."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_index import Location, Member
from megatron_vl.data.shard_reader import ShardReader
from megatron_vl.data.storage.folder import DEFAULT_ACCESS
from megatron_vl.data.storage.remote import RemoteFolder
from megatron_vl.data.tar import walk_tar
from tests.support.file_server import FileServer, serving
from tests.support.tiny_data import picture, write_source

NUM_SHARDS, PER_SHARD = 4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of samples with two images each."""
    folder = tmp_path_factory.mktemp("source")
    samples = {
        f"k{number}": (
            {"text": f"<image> and <image> {number}"},
            {f"{image}.png": picture(60, 40, seed=2 * number + image) for image in range(2)},
        )
        for number in range(NUM_SHARDS * PER_SHARD)
    }
    write_source(folder, samples, max_samples=PER_SHARD)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving({f"/f/{shard.name}": shard.read_bytes() for shard in folder.iterdir()}) as server:
        yield server


def locations(folder: Path, url: str) -> list[Location]:
    """Where the samples of `folder` would be if it were at `url`."""
    return [
        sample for shard in sorted(folder.iterdir()) for sample in samples_of(shard, f"{url}/{shard.name}")
    ]


def samples_of(shard: Path, url: str) -> Iterator[Location]:
    with shard.open("rb") as file:
        members = list(walk_tar(shard, file))
    for _, files in itertools.groupby(members, lambda member: member.name.partition(".")[0]):
        by_name = {file.name.partition(".")[2]: Member(offset=file.offset, size=file.size) for file in files}
        text, images = by_name.pop("json"), tuple(by_name.values())
        yield Location(
            shard=url,
            shard_bytes=shard.stat().st_size,
            key="k",
            text=text,
            images=images,
            num_text_tokens=0,
            image_sizes=np.zeros((len(images), 2), dtype=np.int32),
        )


def read_all(reader: ShardReader, samples: list[Location]) -> list[list[bytes]]:
    def read(sample: Location) -> list[bytes]:
        return [reader.read(sample, member) for member in (sample.text, *sample.images)]

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(read, samples))


@pytest.mark.parametrize("num_shards_held", [1, 2, NUM_SHARDS, None])
def test_remote_members_are_those_on_disk(
    folder: Path, server: FileServer, tmp_path: Path, num_shards_held: int | None
) -> None:
    """By ranges (None), and through caches that hold few shards, whose files go while others read them."""
    here = ShardReader()
    expected = read_all(here, locations(folder, str(folder)))
    num_bytes = sum(len(data) for sample in expected for data in sample)
    assert (here.traffic.bytes_fetched, here.traffic.bytes_used) == (num_bytes, num_bytes)

    access = DEFAULT_ACCESS
    if num_shards_held is not None:
        largest = max(shard.stat().st_size for shard in folder.iterdir())
        access = replace(access, fetch="shards", cache=tmp_path, cache_bytes=num_shards_held * largest)
    reader = ShardReader(access)
    samples = locations(folder, f"{server.url}/f")
    for _ in range(3):
        assert read_all(reader, samples) == expected
    assert reader.traffic.bytes_used == 3 * num_bytes

    num_gets = sum(method == "GET" for method, _ in server.requests)
    if num_shards_held is None:
        assert num_gets == 3 * len(samples)
        assert num_bytes * 3 < reader.traffic.bytes_fetched < 1.3 * num_bytes * 3
    elif num_shards_held == NUM_SHARDS:
        assert num_gets == NUM_SHARDS
        assert reader.traffic.bytes_fetched == sum(shard.stat().st_size for shard in folder.iterdir())


def test_each_thread_holds_its_own_sample(folder: Path, server: FileServer) -> None:
    reader = ShardReader()
    first, second, *_ = locations(folder, f"{server.url}/f")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(reader.read, first, first.text).result()
        other.submit(reader.read, second, second.text).result()
        one.submit(reader.read, first, first.images[0]).result()
        other.submit(reader.read, second, second.images[1]).result()
    assert sum(method == "GET" for method, _ in server.requests) == 2


def test_a_copy_evicted_before_it_is_open_is_fetched_again(
    folder: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evictions = [True, False]
    local_path = RemoteFolder.local_path

    def and_evict(remote: RemoteFolder, name: str) -> Path:
        path = local_path(remote, name)
        if evictions.pop(0):
            path.unlink()
        return path

    monkeypatch.setattr(RemoteFolder, "local_path", and_evict)
    reader = ShardReader(replace(DEFAULT_ACCESS, fetch="shards", cache=tmp_path))
    sample = locations(folder, f"{server.url}/f")[0]
    assert reader.read(sample, sample.text).startswith(b'{"text"')
    assert evictions == []


def test_who_reads_texts_alone_fetches_no_image(folder: Path, server: FileServer) -> None:
    reader = ShardReader(whole_samples=False)
    samples = locations(folder, f"{server.url}/f")
    texts = [reader.read(sample, sample.text) for sample in samples]
    assert all(text.startswith(b'{"text"') for text in texts)
    assert reader.traffic.bytes_fetched == reader.traffic.bytes_used == sum(map(len, texts))


@pytest.mark.parametrize("fetch", ["ranges", "shards"])
def test_a_changed_or_missing_remote_shard_is_named(
    folder: Path, server: FileServer, tmp_path: Path, fetch: str
) -> None:
    reader = ShardReader(replace(DEFAULT_ACCESS, fetch=fetch, cache=tmp_path))
    first, *_, last = locations(folder, f"{server.url}/f")
    grown = replace(first, shard_bytes=first.shard_bytes + 1)
    with pytest.raises(
        UserError,
        match=f"shard {first.shard} has {first.shard_bytes} bytes, its index says {grown.shard_bytes}",
    ):
        reader.read(grown, grown.text)
    assert not [path for method, path in server.requests if method == "GET"]
    with pytest.raises(
        UserError, match=f"shard {first.shard} ends before byte {first.shard_bytes + 7}: it was"
    ):
        reader.read(first, Member(offset=first.shard_bytes, size=7))
    del server.files["/f/" + last.shard.rpartition("/")[2]]
    with pytest.raises(UserError, match=f"{last.shard} is not there"):
        reader.read(last, last.text)


def test_a_failed_request_does_not_spoil_the_next(folder: Path, server: FileServer) -> None:
    """The sample held is the one that was read last, not the one that was asked for."""
    reader = ShardReader(replace(DEFAULT_ACCESS, attempts=1))
    first, second, *_ = locations(folder, f"{server.url}/f")
    text = reader.read(first, first.text)
    server.faults.append("503")
    with pytest.raises(UserError, match="503"):
        reader.read(second, second.text)
    here = locations(folder, str(folder))[1]
    assert reader.read(second, second.text) == ShardReader().read(here, here.text)
    assert reader.read(first, first.text) == text
