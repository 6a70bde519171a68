"""Chromium without a screen, driven through its DevTools protocol: a page is opened, clicked, typed into and read."""

import base64
import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.patience import HANG_SECONDS, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--remote-debugging-port=0"),
)


def find_browser() -> str | None:
    """The program, if there is one in PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page, over one websocket (RFC 6455)."""

    def __init__(self, address: str) -> None:
        place = urlsplit(address)
        self.socket = socket.create_connection((place.hostname, place.port), timeout=HANG_SECONDS)
        self.numbers, self.session = 0, None
        self.errors: list[str] = []  # that scripts of the page did not catch, and what the page's policy forbade
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        head = f"GET {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.file = self.socket.makefile("rb")
        assert b" 101 " in self.file.readline()
        while self.file.readline() != b"\r\n":
            pass
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; events that come meanwhile are looked through for errors."""
        self.numbers += 1
        message = {"id": self.numbers, "method": method, "params": parameters}
        self._send(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode())
        while (answer := json.loads(self._receive())).get("id") != self.numbers:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.errors.append(answer["params"]["entry"]["text"])
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def wait_for(self, script: str) -> None:
        wait_until(lambda: self.value(script), script)

    def press(self, key: str, code: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        box = f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView(); "
        x, y = self.value(
            box + "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """A screen of this size, in light or dark colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[colours])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _send(self, content: bytes) -> None:
        mask, n = secrets.token_bytes(4), len(content)
        length = bytes([0x80 | n]) if n < 126 else b"\xfe" + struct.pack(">H", n) if n < 2**16 else None
        assert length is not None, "a longer message is not needed"
        self.socket.sendall(b"\x81" + length + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(content)))

    def _receive(self) -> bytes:
        content, last = b"", False
        while not last:
            first, second = self.file.read(2)
            last, n = bool(first & 0x80), second & 0x7F
            if n > 125:
                n = int.from_bytes(self.file.read(2 if n == 126 else 8), "big")
            content += self.file.read(n)
        return content


@contextmanager
def browsing(profile: Path) -> Iterator[Tab]:
    """A tab of a browser with a profile of its own, which ends with the block."""
    command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    environment = {**os.environ, "HOME": str(profile)}
    with open(profile.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:

            def address() -> str | None:
                log.seek(0)
                found = re.search(r"DevTools listening on (ws://\S+)", log.read())
                return found[1] if found else None

            wait_until(address, "Chromium listens", lambda: process.poll() is None)
            yield Tab(address())
        finally:
            process.kill()
            process.wait()
