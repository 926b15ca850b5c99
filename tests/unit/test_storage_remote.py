"""Remote folders: what is read is what lies there, through whatever passes; what does not pass is one clear error."""

import itertools
import json
import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest

from megatron_vl.config.data import AccessConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.storage import remote
from megatron_vl.data.storage.folder import DEFAULT_ACCESS, AccessRule, Folder, MissingError, StorageError
from megatron_vl.data.storage.opening import open_folder
from tests.support.file_server import FileServer, serving

DATA = bytes(range(256)) * 40
ACCESS = replace(DEFAULT_ACCESS, attempts=2, timeout_seconds=1.5, backoff_seconds=0.001)
SECRET = "s3cr3t/that+nobody=sees"


@dataclass
class Remote:
    """A folder with the file a.tar of DATA, and its server."""

    folder: Folder
    server: FileServer
    path: str  # of the file at the server


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    meta = {"name": "f/a.tar", "bucket": "bucket", "size": str(len(DATA)), "etag": "x"}
    gcs = "/storage/v1/b/bucket/o"
    files = {
        "/f/a.tar": DATA,
        "/bucket/f/a.tar": DATA,
        f"/download{gcs}/f/a.tar": DATA,
        f"{gcs}/f/a.tar": json.dumps(meta).encode(),
        gcs: json.dumps({"items": [meta]}).encode(),
    }
    with serving(files) as server:
        yield server


@pytest.fixture(scope="module")
def connect(server: FileServer) -> Iterator[Callable[[str], Remote]]:
    """Opens a kind's folder, and connects: what a client does first takes longer than an attempt here may."""
    paths = {"http": "", "s3": "/bucket", "gs": "/download/storage/v1/b/bucket/o"}
    urls = {"http": f"{server.url}/f", "s3": "s3://bucket/f", "gs": "gs://bucket/f"}
    environment = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": server.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": server.url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google itself about the bucket
    }

    @lru_cache
    def open_and_ask(kind: str) -> Remote:
        if kind == "gs":
            pytest.importorskip("gcsfs")
        folder = open_folder(urls[kind], ACCESS)
        with suppress(StorageError):
            folder.size("nothing")
        return Remote(folder, server, paths[kind] + "/f/a.tar")

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield open_and_ask


@pytest.fixture(params=["http", "s3", "gs"])
def far(request: pytest.FixtureRequest, connect: Callable[[str], Remote]) -> Iterator[Remote]:
    remote = connect(request.param)
    remote.server.requests.clear()
    yield remote
    remote.server.faults.clear()
    remote.server.authorization = ""


def test_what_is_read_is_what_lies_there(far: Remote) -> None:
    before = far.folder.bytes_fetched
    assert far.folder.size("a.tar") == len(DATA)
    assert far.folder.read("a.tar", len(DATA)) == DATA
    for offset, size in ((0, 1), (5, 300), (len(DATA) - 1, 1), (7, 0)):
        assert far.folder.read_range("a.tar", offset, size) == DATA[offset : offset + size]
    assert far.folder.bytes_fetched - before == len(DATA) + 302


@pytest.mark.parametrize("fault", ["503", "hang", "reset", "cut", "short"])
def test_what_passes_is_waited_for(far: Remote, fault: str) -> None:
    far.server.faults.append(fault)
    assert far.folder.read_range("a.tar", 5, 300) == DATA[5:305]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("503", "503"), ("hang", "no answer within 1.5 s"), ("reset", ""), ("cut", ""), ("short", "")],
)
@pytest.mark.parametrize("far", ["http", "s3"], indirect=True)  # gcsfs has waits of its own
def test_what_does_not_pass_is_told_once(far: Remote, fault: str, words: str) -> None:
    before = far.folder.bytes_fetched
    far.server.faults.extend([fault] * 9)
    with pytest.raises(StorageError, match=rf"{far.folder.url}/a.tar: .*{words}.*, after 2 attempts in \d s"):
        far.folder.read_range("a.tar", 5, 300)
    assert far.server.num_gets(far.path) >= 2  # more where aiohttp's kept connection was closed
    assert far.folder.bytes_fetched == before


def test_what_will_not_pass_is_not_repeated(far: Remote) -> None:
    with pytest.raises(MissingError, match=f"{far.folder.url}/gone is not there$"):
        far.folder.size("gone")
    with pytest.raises(MissingError, match=f"{far.folder.url}/gone is not there$"):
        far.folder.read_range("gone", 0, 9)
    assert far.folder.size("a.tar") == len(DATA)
    far.server.requests.clear()
    with pytest.raises(StorageError, match=f"a.tar has {len(DATA)} bytes, more than the 9 that"):
        far.folder.read("a.tar", 9)
    assert far.server.num_gets(far.path) == 0
    far.server.faults.append("403")
    with pytest.raises(StorageError, match=r"a.tar: (403 )?Forbidden((?! attempts ).)*$"):
        far.folder.read_range("a.tar", 0, 9)
    far.server.authorization = "none that anybody sends"
    with pytest.raises(StorageError, match=r"a.tar: 401 ((?! attempts ).)*$"):
        far.folder.read_range("a.tar", 0, 9)
    assert far.server.num_gets(far.path) == 2


@pytest.mark.parametrize("fault", ["whole", "elsewhere"])
def test_other_bytes_than_those_asked_for_are_refused(server: FileServer, fault: str) -> None:
    folder = open_folder(f"{server.url}/f", ACCESS)
    server.faults.append(fault)
    with pytest.raises(StorageError, match=r"asked for bytes 5-304, the server answers 20[06] with"):
        folder.read_range("a.tar", 5, 300)


def test_a_server_without_ranges_serves_whole_files(server: FileServer) -> None:
    server.faults.extend(["", "whole"])
    assert open_folder(f"{server.url}/f", ACCESS).read("a.tar", 20_000) == DATA


def test_a_page_of_links_is_a_listing() -> None:
    files = {"/f/a b.tar": b"1", "/f/index.json": b"22", "/f/sub/x": b"333", "/g/y": b""}
    with serving(files) as server:
        assert open_folder(f"{server.url}/f/", ACCESS).sizes() == {"a b.tar": 1, "index.json": 2}
        with pytest.raises(MissingError, match="/nothing is not there"):
            open_folder(f"{server.url}/nothing", ACCESS).sizes()


def test_many_threads_and_a_forked_process_read(far: Remote) -> None:
    folder = open_folder(far.folder.url, replace(ACCESS, timeout_seconds=20))

    def read(offset: int) -> bool:
        return folder.read_range("a.tar", offset, 50) == DATA[offset : offset + 50]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(100)))
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if read(7) else 1))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_credentials_come_from_netrc_and_are_never_told(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pass\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.authorization = "Basic bWU6cGFzcw=="
    assert open_folder(f"{server.url}/f", ACCESS).size("a.tar") == len(DATA)
    server.authorization = ""


@pytest.mark.parametrize("far", ["http", "s3"], indirect=True)
def test_no_credential_is_in_a_message_or_log(
    far: Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = open_folder(far.folder.url, replace(ACCESS, timeout_seconds=10))
    told: list[str] = []
    asks: list[Callable[[], object]] = [
        lambda: folder.size("a.tar"),
        lambda: folder.read_range("a.tar", 5, 300),
        folder.sizes,
    ]
    for fault, ask in itertools.product(("503", "reset", "cut"), asks):
        far.server.faults.extend([fault] * 9)
        try:
            ask()
        except StorageError:
            told.append(traceback.format_exc())
        far.server.faults.clear()
    far.server.authorization = "another"
    with pytest.raises(StorageError) as refused:
        folder.read_range("a.tar", 5, 300)
    told += [str(refused.value), caplog.text, *capfd.readouterr()]
    assert len(told) > 6
    assert not [text for text in told if SECRET in text]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:s3cr3t@bucket/f", "s3://bucket/f: a folder's url is s3://WHERE/PATH"),
        ("https://me:s3cr3t@host/f", "https://host/f: "),
        ("https://host/f?signature=s3cr3t", "https://host/f: "),
        ("https://", "https://WHERE/PATH"),
        (
            "ftp://host/f",
            "ftp:// is not read; a folder is a path, or begins with http://, https://, s3://, gs://",
        ),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(url: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        open_folder(url, ACCESS)
    assert words in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


def test_messages_of_libraries_lose_what_urls_may_hold() -> None:
    text = "cannot reach http://me:s3cr3t@proxy:80/x?X-Amz-Signature=s3cr3t&a=b: refused"
    assert remote.without_credentials(text) == "cannot reach http://proxy:80/x refused"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(
        UserError, match=r"needs s3fs, which is not installed: pip install 'megatron-vl\[s3\]'"
    ):
        open_folder("s3://bucket/f", ACCESS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fetch": "all"}, "data.access.fetch=all must be ranges or shards"),
        ({"fetch": "shards"}, "needs data.access.cache"),
        ({"cache_bytes": 0}, "data.access.cache_bytes=0 must be more than 0"),
        ({"attempts": 0}, "data.access.attempts=0"),
        ({"backoff_seconds": -1.0}, "data.access.backoff_seconds=-1.0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AccessRule.of(AccessConfig(**values))  # type: ignore[arg-type]
