"""S3 by a real server of it: listings of many pages, and files whole, in part and as copies."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.session import get_session
from moto.server import ThreadedMotoServer

from megatron_vl.data.storage.folder import DEFAULT_ACCESS, MissingError, StorageError
from megatron_vl.data.storage.opening import open_folder

ACCESS = replace(DEFAULT_ACCESS, attempts=2, timeout_seconds=10.0, backoff_seconds=0.001)
DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The endpoint of a store with the bucket `pages`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = get_session().create_client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="somebody",
        aws_secret_access_key="s3cr3t",
    )
    client.create_bucket(Bucket="pages")
    files = {"a/": b"", "a/x.tar": DATA, "a/empty": b"", "a/sub/y.tar": b"1", "ab/z.tar": b"2"}
    for name, data in (files | {f"many/{number:02d}": b"x" * (number % 7) for number in range(25)}).items():
        client.put_object(Bucket="pages", Key=name, Body=data)
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def provider(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def test_a_folder_is_its_own_files(tmp_path: Path) -> None:
    access = replace(ACCESS, cache=tmp_path)
    folder = open_folder("s3://pages/a/", access)
    assert folder.sizes() == {"x.tar": len(DATA), "empty": 0}
    assert open_folder("s3://pages/a/x.tar", access).sizes() == {}
    assert folder.read("x.tar", len(DATA)) == DATA
    assert folder.read("empty", 10) == b""
    assert folder.read_range("x.tar", 300, 77) == DATA[300:377]
    assert folder.local_path("x.tar").read_bytes() == DATA
    assert folder.local_path("empty").read_bytes() == b""
    with pytest.raises(StorageError, match=r"x.tar: 416 .*not satisfiable"):
        folder.read_range("x.tar", len(DATA), 1)


def test_a_listing_has_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    assert open_folder("s3://pages/many", ACCESS).sizes() == {f"{i:02d}": i % 7 for i in range(25)}


def test_a_listing_is_never_an_old_one(store: str) -> None:
    folder = open_folder("s3://pages/new", ACCESS)
    with pytest.raises(MissingError, match="s3://pages/new is not there"):
        folder.sizes()
    client = get_session().create_client("s3")
    for name in ("one", "two"):
        client.put_object(Bucket="pages", Key=f"new/{name}", Body=b"1")
        assert name in folder.sizes()


def test_what_is_not_there_is_named(store: str) -> None:
    for url in ("s3://pages/a", "s3://nowhere/a"):
        with pytest.raises(MissingError, match=f"{url}/gone is not there"):
            open_folder(url, ACCESS).size("gone")


def test_who_has_no_credentials_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StorageError, match=r"s3://pages/a/x.tar: Unable to locate credentials$"):
        open_folder("s3://pages/a", ACCESS).size("x.tar")
