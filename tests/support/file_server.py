"""A server of files on loopback that misbehaves as it is told. Clients of S3 and GCS can read of it too."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class FileServer:
    """`files` by path. Each request that is about one of them meets the next of `faults`, if there is one.

    403: refused; 503: too busy; hang: no answer; reset: the connection ends without an answer; cut: half of the
    body; short: a length of half of it; whole: the range is ignored; elsewhere: other bytes than asked for.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: deque[str] = field(default_factory=deque)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    seconds: float = 0.0  # that a file takes
    authorization: str = ""  # refused without it, if it is set
    closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def num_gets(self, path: str) -> int:
        """How often the file was asked for."""
        return self.requests.count(("GET", path))


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FileServer]:
    """Serve `files`, by path."""
    state = FileServer(files=files)

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FileServer

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _serve(self, with_body: bool) -> None:
        state = self.server_state
        path = unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path))
        if state.authorization and self.headers["Authorization"] != state.authorization:
            self._answer(401, b"", with_body)
        elif path in state.files:
            self._serve_file(state.files[path], with_body)
        elif listed := sorted(name for name in state.files if name.startswith(path) and path.endswith("/")):
            links = "".join(f'<a href="{name.removeprefix(path)}">x</a>' for name in listed)
            self._answer(200, f'<a href="../">up</a><a href="?C=N">sort</a>{links}'.encode(), with_body)
        else:
            self._answer(404, b"", with_body)

    def _serve_file(self, data: bytes, with_body: bool) -> None:
        state = self.server_state
        fault = state.faults.popleft() if state.faults else ""
        start, stop = self._range(len(data), fault)
        ranged = fault != "whole" and "Range" in self.headers
        body = data[start:stop] if ranged else data
        state.closing.wait(30 if fault == "hang" else state.seconds * with_body)
        if fault in ("hang", "reset"):
            self.close_connection = True
            return
        if fault in ("403", "503"):
            self._answer(int(fault), SLOW_DOWN if fault == "503" else b"", with_body)
            return
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body) // 2 if fault == "short" else len(body)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "short") else body)
        self.close_connection = fault in ("cut", "short")

    def _range(self, num_bytes: int, fault: str) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        shift = 1 if fault == "elsewhere" else 0
        return int(first) + shift, min(num_bytes, int(last or num_bytes - 1) + 1 + shift)

    def _answer(self, status: int, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
