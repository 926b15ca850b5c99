"""The node's cache: bounded, fetched once by all processes, and whole whoever is killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.storage import cache as storage_cache
from megatron_vl.data.storage import remote
from megatron_vl.data.storage.cache import FOLDER, NodeCache
from megatron_vl.data.storage.folder import DEFAULT_ACCESS, StorageError
from megatron_vl.data.storage.opening import open_folder
from tests.support.file_server import FileServer, serving

DATA = os.urandom(300_000)
FETCH = """
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from megatron_vl.data.storage.folder import DEFAULT_ACCESS
from megatron_vl.data.storage.opening import open_folder
url, cache = sys.argv[1:]
folder = open_folder(url, replace(DEFAULT_ACCESS, cache=Path(cache)))
print(folder.local_path("a.tar").stat().st_size, flush=True)
"""


def writer(data: bytes) -> Callable[[int], None]:
    return lambda descriptor: remote.write_all(descriptor, data, 0)


def held(cache: NodeCache) -> dict[str, int]:
    """Names and sizes of all that is in the cache but its lock."""
    found = {}
    for path in cache.folder.iterdir():
        with suppress(FileNotFoundError):  # renamed or evicted just now
            found[path.name] = path.stat().st_size
    return {name: size for name, size in found.items() if name != ".lock"}


def fill_or_fail(data: bytes, fails: bool, calls: list[int], descriptor: int) -> None:
    calls.append(descriptor)
    if fails:
        raise StorageError("no")
    writer(data)(descriptor)


@given(requests=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=25))
@settings(max_examples=40, deadline=None)
def test_the_cache_is_a_least_recently_used_one(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, bool]]
) -> None:
    """Against a plain list of keys; a fetch that fails leaves nothing. Key k has 10 (k + 1) bytes."""
    cache = NodeCache(tmp_path_factory.mktemp("cache"), 100)
    model: OrderedDict[int, int] = OrderedDict()
    for key, fails in requests:
        data, fetched = bytes([key]) * (10 * (key + 1)), list[int]()
        fill = partial(fill_or_fail, data, fails, fetched)
        is_new = key not in model
        if is_new:
            while sum(model.values()) + len(data) > 100:
                model.popitem(last=False)
        if is_new and fails:
            with pytest.raises(StorageError, match=r"no"):
                cache.path(str(key), len(data), "url", fill)
        else:
            assert cache.path(str(key), len(data), "url", fill).read_bytes() == data
            model[key] = len(data)
            model.move_to_end(key)
        assert bool(fetched) == is_new
        if cache.folder.exists():
            assert held(cache) == {str(key): size for key, size in model.items()}


def test_the_bound_holds_while_many_threads_fetch(tmp_path: Path) -> None:
    cache, largest, num_fetched = NodeCache(tmp_path, 3500), [0], list[int]()

    def read(number: int) -> bool:
        key = number * 7 % 20

        def fill(descriptor: int) -> None:
            largest[0] = max(largest[0], sum(held(cache).values()))
            num_fetched.append(key)
            writer(bytes([key]) * 1000)(descriptor)

        while True:
            try:
                return cache.path(str(key), 1000, "url", fill).read_bytes() == bytes([key]) * 1000
            except FileNotFoundError:
                continue  # evicted before it was open: as it may be

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(200)))
    assert 2000 <= largest[0] <= 3500
    assert sum(held(cache).values()) <= 3500
    assert len(num_fetched) >= 20


def test_a_file_that_is_evicted_stays_readable_for_who_has_it_open(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    with cache.path("a", 900, "url", writer(b"a" * 900)).open("rb") as file:
        cache.path("b", 900, "url", writer(b"b" * 900))
        assert held(cache) == {"b": 900}
        assert file.read() == b"a" * 900


def test_what_the_cache_cannot_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"s3://x/a.tar has 1001 bytes, more than data.access.cache_bytes=1000"
    ):
        NodeCache(tmp_path, 1000).path("a", 1001, "s3://x/a.tar", writer(b""))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"data.access.cache: .*file/.* cannot take the 5 bytes of url: Not a dir"
    ):
        NodeCache(tmp_path / "file", 1000).path("a", 5, "url", writer(b"12345"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = NodeCache(tmp_path, 1000)
    with pytest.raises(StorageError, match=r"cannot take the 5 bytes of url: No space left"):
        cache.path("a", 5, "url", full)
    assert held(cache) == {}


def test_a_copy_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    cache.path("a", 5, "url", writer(b"12345")).write_bytes(b"123")
    assert cache.path("a", 5, "url", writer(b"12345")).read_bytes() == b"12345"


def test_a_copy_that_another_made_since_it_was_looked_for_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path, 1000)
    cache.path("a", 5, "url", writer(b"12345"))
    looks = iter([False])
    monkeypatch.setattr(storage_cache, "_is_there", lambda copy, size: next(looks, True))
    assert cache.path("a", 5, "url", writer(b"67890")).read_bytes() == b"12345"
    assert held(cache) == {"a": 5}


@pytest.mark.timeout(20)
def test_a_leftover_of_the_file_itself_takes_no_room(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    cache.folder.mkdir()
    (cache.folder / "a.partial").write_bytes(b"x" * 900)
    assert cache.path("a", 900, "url", writer(b"a" * 900)).read_bytes() == b"a" * 900


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"x" * 5000)
    NodeCache(tmp_path, 1000).path("a", 900, "url", writer(b"a" * 900))
    assert (tmp_path / "thesis.tex").exists()


def test_processes_fetch_a_shard_once(tmp_path: Path) -> None:
    with serving({"/f/a.tar": DATA}) as server:
        server.seconds = 0.5
        fetching = [fetch_in_process(server, tmp_path) for _ in range(3)]
        assert [process.communicate(timeout=60)[0] for process in fetching] == ["300000\n"] * 3
        assert server.num_gets("/f/a.tar") == 1


def fetch_in_process(server: FileServer, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, f"{server.url}/f", str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_in_the_middle_holds_up_nobody(tmp_path: Path) -> None:
    """The next to fetch waits for it, then takes over; what it left of another file is removed."""
    with serving({"/f/a.tar": DATA, "/f/b.tar": DATA[:5]}) as server:
        cache = NodeCache(tmp_path, 10**9)
        server.faults.extend(["", "hang"])
        killed = fetch_in_process(server, tmp_path)
        wait_for(lambda: server.num_gets("/f/a.tar") == 1)
        assert list(held(cache).values()) == [len(DATA)]  # counts at its full size
        waiting = fetch_in_process(server, tmp_path)
        wait_for(lambda: server.requests.count(("HEAD", "/f/a.tar")) == 2)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert waiting.communicate(timeout=60)[0] == "300000\n"
        (copy,) = cache.folder.glob("*-a.tar")
        assert copy.read_bytes() == DATA

        server.faults.extend(["", "hang"])
        copy.unlink()
        killed = fetch_in_process(server, tmp_path)
        wait_for(lambda: server.num_gets("/f/a.tar") == 3)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        server.faults.clear()
        folder = open_folder(f"{server.url}/f", replace(DEFAULT_ACCESS, cache=tmp_path, cache_bytes=10**9))
        folder.local_path("b.tar")
        assert list(held(cache).values()) == [5]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_large_file_comes_in_parts_of_which_one_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 70_000)
    access = replace(DEFAULT_ACCESS, cache=tmp_path, attempts=2, backoff_seconds=0.001)
    with serving({"/f/a.tar": DATA}) as server:
        folder = open_folder(f"{server.url}/f", access)
        server.faults.extend(["", "", "cut", "", "503"])
        assert folder.local_path("a.tar").read_bytes() == DATA
        assert (server.num_gets("/f/a.tar"), folder.bytes_fetched) == (5 + 2, len(DATA))
        assert folder.local_path("a.tar").read_bytes() == DATA
        assert server.num_gets("/f/a.tar") == 7
        server.files["/f/a.tar"] = DATA[::-1]
        later = open_folder(f"{server.url}/f", access)
        assert later.local_path("a.tar").read_bytes() == DATA[::-1]  # another version is another copy


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    access = replace(DEFAULT_ACCESS, cache=tmp_path, attempts=1)
    with serving({"/f/a.tar": DATA}) as server:
        folder = open_folder(f"{server.url}/f", access)
        server.faults.extend(["", "503"])
        with pytest.raises(StorageError, match=r"a.tar: 503 Service Unavailable$"):
            folder.local_path("a.tar")
        assert list((tmp_path / FOLDER).glob("*.tar*")) == []
        assert folder.local_path("a.tar").read_bytes() == DATA


def test_without_a_cache_there_is_no_local_file() -> None:
    with pytest.raises(StorageError, match=r"set data.access.cache"):
        open_folder("http://127.0.0.1:9/f", DEFAULT_ACCESS).local_path("a.tar")
