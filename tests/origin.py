"""A web server on loopback that serves bytes by path and misbehaves as it is told."""

import contextlib
import hashlib
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.patience import HANG_SECONDS
from tests.programs import run_program

ROOT = Path(__file__).resolve().parent.parent


class Origin(http.server.ThreadingHTTPServer):
    """`files` by path. Each request with a body uses up the first of `faults[path]` and, once there is none, is
    answered well: with ETag, Last-Modified and ranges. `heads[path]` answers HEAD instead. `log` has what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Callable[[Handler, bytes], None]]] = defaultdict(list)
        self.heads: dict[str, Callable[[Handler, bytes], None]] = {}
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""

    def asked(self, path: str, method: str = "GET") -> list[str | None]:
        """The ranges asked for, in order."""
        return [span for asked, where, span in self.log if (asked, where) == (method, path)]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Origin

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.log.append((self.command, self.path, self.headers.get("Range")))
        if self.path not in self.server.files:
            return self.send_error(404)
        content, faults = self.server.files[self.path], self.server.faults[self.path]
        if self.command == "HEAD":
            return self.server.heads.get(self.path, serve)(self, content)
        return (faults.pop(0) if faults else serve)(self, content)


def serve(
    handler: Handler,
    content: bytes,
    *,
    cut: int | None = None,
    reset: bool = False,
    length: int | None = None,
    etag: str | None = "",
    modified: str | None = "Wed, 01 Mar 2023 00:00:00 GMT",
    ranges: bool = True,
    if_range: bool = True,
    **headers: str,
) -> None:
    """Answer as a good server does, or: end the connection after the byte `cut` of the file, promise another length,
    give another ETag ("": the right one) or date or none, know no ranges, or take no notice of If-Range."""
    etag = '"' + hashlib.md5(content).hexdigest() + '"' if etag == "" else etag
    start = 0
    asked = handler.headers.get("Range")
    if asked and ranges and (not if_range or handler.headers.get("If-Range") in (etag, modified)):
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return handler.send_error(416)
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start if length is None else length))
    for name, value in {"ETag": etag, "Last-Modified": modified, **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content[start:cut])
        if reset:  # a RST instead of a FIN
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
    return None


def fault(**changes: object) -> Callable[[Handler, bytes], None]:
    return lambda handler, content: serve(handler, content, **changes)


def status(code: int, **headers: str) -> Callable[[Handler, bytes], None]:
    """An answer without the file."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": "0"}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def storm(size: int) -> list[Callable[[Handler, bytes], None]]:
    """Twice busy, ten connections dropped on the way through `size` bytes, then no ranges: all can be borne."""
    drops = [fault(cut=size * i // 10, reset=i % 2 == 1) for i in range(10)]
    return [status(503), status(503), *drops, fault(ranges=False)]


@contextlib.contextmanager
def running() -> Iterator[Origin]:
    with Origin() as origin:
        thread = threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield origin
        finally:
            origin.shutdown()
            thread.join()


ENVIRONMENT = {**os.environ, "no_proxy": "127.0.0.1"}


def run_script(name: str, *words: str | Path, real: bool = False) -> subprocess.CompletedProcess[str]:
    """`python preprocessing/{name}.py ...`, in a python of its own where the script itself starts processes."""
    script = [f"preprocessing/{name}.py", *map(str, words)]
    if not real:
        return run_program(script, env=ENVIRONMENT)
    settings = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": HANG_SECONDS}
    return subprocess.run([sys.executable, *script], check=False, **settings)


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a script that failed said: one line, no traceback."""
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
