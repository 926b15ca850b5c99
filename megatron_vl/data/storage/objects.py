"""A folder of an object store: s3:// by s3fs, gs:// by gcsfs.

Where the store is and who asks are told by the providers that those libraries know, and by nothing of ours.
"""

from http.client import responses
from importlib import import_module
from typing import Any

import fsspec
from aiohttp import ClientError

from megatron_vl.data.storage.store import Failure, Stat, is_passing

NETWORK = (ConnectionError, TimeoutError, ClientError)


class ObjectStore:
    """A `Store`: the objects under one prefix of a bucket."""

    errors: tuple[type[Exception], ...]
    passing: tuple[type[Exception], ...]  # those without a status that are worth another attempt

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """`options` are those of fsspec's file system for the url."""
        scheme, _, self._prefix = url.partition("://")
        self._files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)

    async def list(self) -> dict[str, int | None]:
        entries = await self._files._ls(self._prefix, detail=True)  # fsspec's coroutines begin with _
        sizes = {entry["name"]: entry["size"] for entry in entries if entry["type"] == "file"}
        start = f"{self._prefix}/"
        itself = (self._prefix, start)  # an object, or the mark of a folder that a console made
        return {name.removeprefix(start): size for name, size in sizes.items() if name not in itself}

    async def stat(self, name: str) -> Stat:
        info = await self._files._info(f"{self._prefix}/{name}")
        if info["type"] != "file":
            raise FileNotFoundError
        return Stat(size=info["size"], version=str(info.get("ETag") or info.get("etag") or ""))

    async def fetch(self, name: str, offset: int, size: int) -> bytes:
        data = await self._files._cat_file(f"{self._prefix}/{name}", start=offset, end=offset + size)
        return bytes(data)

    def explain(self, error: Exception) -> Failure:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        text = " ".join(told.split())
        status = _status(error)
        if status is None:
            return Failure(text, passing=isinstance(error, self.passing))
        passing = is_passing(status) or isinstance(error, TimeoutError)  # S3 may answer 400 RequestTimeout
        return Failure(f"{status} {responses.get(status, '')}: {text}", passing=passing)


class S3Store(ObjectStore):
    """Needs s3fs, which is optional, as is what it needs."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        known = import_module("botocore.exceptions")
        parsers = import_module("botocore.parsers")  # an answer to too many requests may be no XML
        lost = (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError)
        self.passing = (*NETWORK, *lost, parsers.ResponseParserError)
        self.errors = (OSError, *self.passing, known.BotoCoreError, known.ClientError)
        timeouts = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        once = {"total_max_attempts": 1}  # for attempts are counted by who asks us
        super().__init__(url, {"config_kwargs": {"retries": once, **timeouts}})
        self._files.retries = 1


class GcsStore(ObjectStore):
    """Needs gcsfs, which is optional. An attempt of ours may be several of its own, within the same time."""

    def __init__(self, url: str) -> None:
        retry, google = import_module("gcsfs.retry"), import_module("google.auth.exceptions")
        requests = import_module("requests.exceptions")
        self.passing = (*NETWORK, requests.RequestException, google.TransportError)
        self.errors = (OSError, *self.passing, retry.HttpError, google.GoogleAuthError, ValueError)
        try:
            super().__init__(url, {"access": "read_only"})
        except self.errors as error:  # it looks for credentials at once
            raise self.explain(error) from None


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error, or the one of botocore that it came from, tells."""
    for name in ("code", "status"):  # of gcsfs, of aiohttp
        if isinstance(status := getattr(error, name, None), int):
            return status
    origin: BaseException | None = error
    while origin is not None:
        if isinstance(response := getattr(origin, "response", None), dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
        origin = origin.__cause__ or origin.__context__
    return None
