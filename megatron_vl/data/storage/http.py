"""A folder of an http or https server. Credentials come from ~/.netrc, proxies from the environment."""

import asyncio
from http import HTTPStatus
from urllib.parse import quote, unquote

import fsspec
from aiohttp import ClientError, ClientResponse, ClientResponseError

from megatron_vl.data.storage.store import Failure, Stat, is_passing

AS_STORED = {"Accept-Encoding": "identity"}  # a compressed answer would have other offsets


class HttpStore:
    """A `Store`. The server must answer HEAD with sizes, and serve ranges unless a file is asked for whole."""

    errors: tuple[type[Exception], ...] = (Failure, OSError, ClientError, EOFError)

    def __init__(self, url: str) -> None:
        self._url = url
        self._files = fsspec.filesystem(
            "http", skip_instance_cache=True, use_listings_cache=False, client_kwargs={"trust_env": True}
        )

    async def list(self) -> dict[str, int | None]:
        """From the links of the page that the server makes for a folder."""
        links = await self._files._ls(f"{self._url}/", detail=False)  # fsspec's coroutines begin with _
        names = [unquote(link.removeprefix(f"{self._url}/").removeprefix("./")) for link in links]
        return {name: None for name in names if name and not set(name) & set("/?#")}

    async def stat(self, name: str) -> Stat:
        session = await self._files.set_session()
        async with session.head(self._file(name), headers=AS_STORED, allow_redirects=True) as response:
            _check(response)
            if response.content_length is None:
                raise Failure("the server does not tell the file's size", passing=False)
            version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
            return Stat(size=response.content_length, version=version)

    async def fetch(self, name: str, offset: int, size: int) -> bytes:
        last = offset + size - 1
        session = await self._files.set_session()
        headers = AS_STORED | {"Range": f"bytes={offset}-{last}"}
        async with session.get(self._file(name), headers=headers) as response:
            _check(response)
            sent = response.headers.get("Content-Range", "")
            is_whole = offset == 0 and response.content_length == size
            if not sent.startswith(f"bytes {offset}-") and not is_whole:
                answer = f"{response.status} with {sent or 'the whole file'}"
                raise Failure(f"asked for bytes {offset}-{last}, the server answers {answer}", passing=False)
            return bytes(await response.content.readexactly(size))

    def explain(self, error: Exception) -> Failure:
        if isinstance(error, Failure):
            return error
        if isinstance(error, ClientResponseError):
            return Failure(f"{error.status} {error.message}", passing=is_passing(error.status))
        if isinstance(error, asyncio.IncompleteReadError):
            return Failure(f"cut off after {len(error.partial)} of {error.expected} bytes", passing=True)
        return Failure(str(error) or type(error).__name__, passing=True)

    def _file(self, name: str) -> str:
        return f"{self._url}/{quote(name)}"


def _check(response: ClientResponse) -> None:
    """Raise what an answer without the file means."""
    if response.status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise Failure(f"{response.status} {response.reason}", passing=is_passing(response.status))
