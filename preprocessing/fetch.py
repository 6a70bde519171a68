"""Download files so that in the end each is right or not there: several at a time, resumed, retried, checked."""

import contextlib
import email.utils
import hashlib
import http.client
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from partial import FetchError, PartialFile, Version

CHUNK = 1 << 20  # bytes
LONGEST_WAIT = 300  # seconds between two attempts
MIRROR = "--base_url takes the address of a mirror"


class Transient(Exception):
    """What went wrong and may go right at the next attempt, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Download(NamedTuple):
    """One file to be had."""

    url: str
    target: Path
    sha256: str | None = None


@dataclass
class Fetcher:
    """Fetches files: `parallel` at a time, with `retries` after failures in a row that brought no new bytes.

    Waits `retry_wait` seconds before the second attempt, then twice as long each time, or as long as the server asks.
    `timeout` is the longest silence of a server, in seconds.
    """

    parallel: int = 4
    retries: int = 5
    retry_wait: float = 1.0
    timeout: float = 60.0
    opener: urllib.request.OpenerDirector = field(default_factory=lambda: web_opener(), repr=False)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def fetch(self, downloads: Sequence[Download]) -> set[Download]:
        """Have every file at its target; those that were not there already. What is there and right is not touched.

        Right means: of the given SHA-256; without one, of the length that the server names.

        Raises:
            FetchError: a server refuses or lies, the disk is too small, a checksum differs. Every target is then as
                it was or right.
        """
        versions = dict(self._each(self._look_up, downloads))
        missing = {download: version for download, version in versions.items() if version is not None}
        for download in missing:
            download.target.parent.mkdir(parents=True, exist_ok=True)
        self._check_space(missing)
        total = sum(version.size or 0 for version in missing.values())
        lock = threading.Lock()
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

            def progress(size: int) -> None:
                with lock:
                    bar.update(size)

            for done, _ in enumerate(self._each(lambda one: self._fetch_one(one, missing[one], progress), missing), 1):
                bar.set_postfix_str(f"{done} of {len(missing)} files")
        return set(missing)

    def _each(self, action: Callable, downloads: Sequence[Download]) -> Iterator[tuple[Download, object]]:
        """Results as they come. The first error stops all the others, which leave their parts for the next time.

        They are waited for, but not when the user wants to go: a server may be silent for `timeout` seconds.
        """
        patient = True
        pool = ThreadPoolExecutor(self.parallel)
        futures = {pool.submit(action, download): download for download in downloads}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            self.stop.set()
            patient = not isinstance(error, KeyboardInterrupt)
            raise
        finally:
            pool.shutdown(wait=patient, cancel_futures=True)

    def _look_up(self, download: Download) -> Version | None:
        """What the server has; None if the target is right."""
        url, target, sha256 = download
        if target.is_dir():
            raise FetchError(f"{target} is a directory, but a file of this name is to be fetched")
        if sha256 and target.exists() and digest(target) == sha256:
            return None
        version = self._patiently(lambda: self._head(url))
        if not sha256 and target.exists() and target.stat().st_size == version.size:
            return None
        return version

    def _head(self, url: str) -> Version:
        with contextlib.suppress(FetchError), self._open(url, "HEAD") as response:
            version = Version.of(response.headers)
            if version.size is not None:
                return version
        with self._open(url) as response:  # there are servers that only answer this
            return Version.of(response.headers)

    def _check_space(self, missing: dict[Download, Version]) -> None:
        for device in {download.target.parent.stat().st_dev for download in missing}:
            here = {d: v for d, v in missing.items() if d.target.parent.stat().st_dev == device}
            parts = [download.target.with_name(download.target.name + ".part") for download in here]
            needed = sum(version.size or 0 for version in here.values())
            needed -= sum(part.stat().st_size for part in parts if part.exists())
            free = shutil.disk_usage(parts[0].parent).free
            if needed > free:
                raise FetchError(
                    f"{parts[0].parent}: {readable(needed)} are to be fetched and {readable(free)} are free; "
                    "make room or take another --output_directory"
                )

    def _fetch_one(self, download: Download, version: Version, progress: Callable[[int], object]) -> None:
        with PartialFile(download.target, progress) as part:
            if part.version != version or version.validator is None:
                part.clear()  # the beginning of something else, or of nobody knows what
            for _ in range(2):
                if not part.complete:
                    self._patiently(lambda: self._attempt(download, version, part), lambda: part.size)
                found = hashlib.file_digest(part.content(), "sha256").hexdigest() if download.sha256 else None
                if found == download.sha256:
                    return part.finish()
                pieced_together = part.resumed
                part.clear()
                if not pieced_together:  # otherwise the pieces may be of two files: once more, in one piece
                    break
        raise FetchError(
            f"{download.url}: what came has the SHA-256 {found} instead of {download.sha256} and was thrown away; "
            f"{MIRROR}"
        )

    def _attempt(self, download: Download, expected: Version, part: PartialFile) -> None:
        """One request, which goes on where the last one ended. Raises: Transient, FetchError."""
        headers = {}
        if part.size and part.version.validator:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.version.validator}
        with self._open(download.url, "GET", headers, part) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise FetchError(
                    f"{download.url}: the server sends the file encoded, which was not asked for; {MIRROR}"
                )
            if response.status == 200:
                part.begin(self._agreed(download, expected, response))
            elif response.status == 206 and goes_on(response.headers, part):
                part.resumed = True
            else:
                part.clear()
                raise Transient(f"{download.url}: the server answered with other bytes than it was asked for")
            self._copy(download.url, response, part)
        if part.version.size is None:  # the SHA-256 will tell
            part.version = part.version._replace(size=part.size)
        if not part.complete:
            raise Transient(f"{download.url}: the connection ended after {part.size:,} of {part.version.size:,} bytes")

    def _agreed(self, download: Download, expected: Version, response: http.client.HTTPResponse) -> Version:
        """The version of an answer with the whole file. Raises: FetchError if the length is not known for sure."""
        size, validator = response.length, Version.of(response.headers).validator
        if validator == expected.validator and expected.size is not None and not download.sha256:
            if size is None:
                size = expected.size
            elif size != expected.size:
                raise FetchError(
                    f"{download.url}: the server names two lengths, {expected.size:,} and {size:,} bytes; {MIRROR}"
                )
        if size is None and not download.sha256:
            raise FetchError(
                f"{download.url}: the server does not say how long the file is, so that nobody knows when it is whole; "
                "give its SHA-256 with --checksums"
            )
        return Version(size, validator)

    def _copy(self, url: str, response: http.client.HTTPResponse, part: PartialFile) -> None:
        left = response.length  # None: up to the end, or in chunks, which say themselves where they end
        if left is not None:
            response.length += 1  # http.client would not look whether more comes than was promised
        while left is None or left > 0:
            with self._network(url):
                chunk = response.read1(CHUNK if left is None else min(CHUNK, left))
            if not chunk:
                break
            part.append(chunk)
            left = None if left is None else left - len(chunk)
            if self.stop.is_set():
                raise FetchError(f"{url}: stopped")
        more = part.version.size is not None and part.size > part.version.size
        with contextlib.suppress(Transient), self._network(url):
            more = more or (left == 0 and response.read(1) != b"")
        if more:
            size = part.version.size
            part.clear()
            raise FetchError(f"{url}: the server sends more than the {size:,} bytes it promised; {MIRROR}")

    def _open(
        self, url: str, method: str = "GET", headers: dict | None = None, part: PartialFile | None = None
    ) -> http.client.HTTPResponse:
        """Raises: Transient, FetchError."""
        request = urllib.request.Request(check_address(url), method=method, headers=headers or {})
        try:
            with self._network(url):
                return self.opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and part:  # the file is not as long as the part
                    part.clear()
                raise refusal(url, error) from error

    @contextlib.contextmanager
    def _network(self, url: str) -> Iterator[None]:
        """What the line does wrong is Transient; what the disk does wrong is not."""
        try:
            yield
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise FetchError(f"{url}: the server cannot prove who it is ({reason.verify_message})") from error
            raise Transient(f"{url}: {str(reason) or type(reason).__name__}") from error

    def _patiently(self, action: Callable, gained: Callable[[], int] = lambda: 0) -> object:
        """The action's result, however often it takes; failures count as long as no new bytes are gained."""
        failures, best = 0, gained()
        while True:
            try:
                return action()
            except Transient as error:
                if gained() > best:
                    failures, best = 0, gained()
                failures += 1
                if failures > self.retries:
                    raise FetchError(
                        f"{error} (attempt {failures}, the last one); the same command goes on, {MIRROR}"
                    ) from error
                wait = error.wait if error.wait is not None else self.retry_wait * 2 ** (failures - 1)
                if self.stop.wait(min(wait, LONGEST_WAIT)):
                    raise FetchError(f"{error}; stopped") from error


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https, and from https to https only."""

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        """The request to the new address. Raises: FetchError if it is not followed."""
        check_address(newurl)
        if request.type == "https" and not newurl.lower().startswith("https:"):
            raise FetchError(f"{request.full_url}: the server redirects from https to {newurl}, which is not followed")
        following = super().redirect_request(request, fp, code, msg, headers, newurl)
        following.method = request.get_method()  # a HEAD stays a HEAD
        return following


def web_opener() -> urllib.request.OpenerDirector:
    """Opens http and https addresses, through a proxy if the environment names one."""
    opener = urllib.request.OpenerDirector()  # build_opener() would add handlers for file:, ftp: and data:
    opener.addheaders = [("User-Agent", "atlas-preprocessing")]
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        WebRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def check_address(url: str) -> str:
    """The address. Raises: FetchError if it is not an http or https one."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise FetchError(f"{url} is not followed: only http:// and https:// addresses are")
    return url


def refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """What an answer that is not the file means."""
    if error.code in (401, 403):
        return FetchError(
            f"{url}: permission denied ({error.code}); the host does not offer this file, or not to you: {MIRROR}"
        )
    if error.code in (404, 410):
        return FetchError(f"{url}: not found ({error.code}); {MIRROR}")
    if 300 <= error.code < 400:
        return FetchError(f"{url}: redirected ({error.code}) in a circle, to nowhere, or away from http and https")
    if error.code in (408, 416, 425, 429) or (error.code >= 500 and error.code != 501):
        wait = seconds_to_wait(error.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            return FetchError(f"{url}: the server is busy ({error.code}) and asks to come back in {wait:.0f} seconds")
        return Transient(f"{url}: the server answers {error.code} ({error.reason})", wait)
    return FetchError(f"{url}: the server answers {error.code} ({error.reason})")


def seconds_to_wait(header: str | None) -> float | None:
    """`Retry-After`: seconds or a date; None if there is none that can be read."""
    if header is None or header.strip().isdecimal():
        return None if header is None else float(header)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return None


def goes_on(headers: http.client.HTTPMessage, part: PartialFile) -> bool:
    """Whether a 206 answer starts where the part ends and is of the same version."""
    span, _, total = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
    same = Version.of(headers).validator in (None, part.version.validator) if part.version else False
    return same and span.startswith(f"{part.size}-") and total in ("*", str(part.version.size))


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(size: int) -> str:
    """A number of bytes with a unit."""
    return tqdm.format_sizeof(size, "B", 1024)
