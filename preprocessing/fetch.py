"""Download files, several at a time, resumed, retried and checked. In the end each file is complete or absent."""

import contextlib
import email.utils
import hashlib
import http.client
import itertools
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

from atlas.files.jsonl import replacing
from partial import FetchError, PartialFile, Version

CHUNK = 1 << 20  # bytes
LONGEST_WAIT = 300  # seconds between two attempts
LONGEST_PAGE = 1 << 24  # bytes
MIRROR = "--base_url accepts the address of a mirror"


class Transient(Exception):
    """A failure that the next attempt may not have, after `wait` seconds if the server asked for that."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Download(NamedTuple):
    """One file to download."""

    url: str
    target: Path
    sha256: str | None = None


@dataclass
class Fetcher:
    """Fetches files, `parallel` at a time, and gives up after `retries` retries in a row without new bytes.

    Waits `retry_wait` seconds before the second attempt, then twice as long each time, or as long as the server asks.
    `timeout` is how long a server may send nothing, in seconds.
    """

    parallel: int = 4
    retries: int = 5
    retry_wait: float = 1.0
    timeout: float = 60.0
    opener: urllib.request.OpenerDirector = field(default_factory=lambda: web_opener(), repr=False)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def fetch(self, downloads: Sequence[Download]) -> set[Download]:
        """Fetch every file that is not already complete at its target; returns the files that were fetched.

        Complete means that it has the given SHA-256 or, without one, the length that the server reports.

        Raises:
            FetchError: a server refuses or sends something else, the disk is too small, a checksum differs. Every
                target is then unchanged or complete.
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

    def read(self, address: str) -> tuple[str, bytes]:
        """The address of a page, after redirects, and its content. Raises: FetchError."""

        def attempt() -> tuple[str, bytes]:
            with self._open(address) as response, self._network(address):
                content = response.read(LONGEST_PAGE)
                if response.length:
                    raise Transient(f"{address}: only {len(content):,} bytes of the page could be read")
                return response.url, content

        return self._with_retries(attempt)

    def _each(self, action: Callable, downloads: Sequence[Download]) -> Iterator[tuple[Download, object]]:
        """Results as they are ready. The first error stops all other downloads, which keep their partial files.

        Their threads are waited for, except after Ctrl-C: a server may send nothing for `timeout` seconds.
        """
        wait = True
        pool = ThreadPoolExecutor(self.parallel)
        futures = {pool.submit(action, download): download for download in downloads}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            self.stop.set()
            wait = not isinstance(error, KeyboardInterrupt)
            raise
        finally:
            pool.shutdown(wait=wait, cancel_futures=True)

    def _look_up(self, download: Download) -> Version | None:
        """The server's version of the file; None if the target is complete."""
        url, target, sha256 = download
        if target.is_dir():
            raise FetchError(f"{target} is a directory, but should be a file; move it away")
        if sha256 and target.exists() and digest(target) == sha256:
            return None
        version = self._with_retries(lambda: self._head(url))
        if not sha256 and target.exists() and target.stat().st_size == version.size:
            return None
        return version

    def _head(self, url: str) -> Version:
        with contextlib.suppress(FetchError), self._open(url, "HEAD") as response:
            version = Version.of(response.headers)
            if version.size is not None:
                return version
        with self._open(url) as response:  # some servers do not answer HEAD
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
                    f"{parts[0].parent}: {readable(needed)} are needed, but only {readable(free)} are free; "
                    "free some space or choose another --output_directory"
                )

    def _fetch_one(self, download: Download, version: Version, progress: Callable[[int], object]) -> None:
        with PartialFile(download.target, progress) as part:
            if part.version != version or version.validator is None:
                part.clear()  # it belongs to another version, or to an unknown one
            for _ in range(2):
                if not part.complete:
                    self._with_retries(lambda: self._attempt(download, version, part), lambda: part.size)
                sha256 = hashlib.file_digest(part.content(), "sha256").hexdigest() if download.sha256 else None
                if sha256 == download.sha256:
                    return part.finish()
                was_resumed = part.resumed
                part.clear()
                if not was_resumed:  # a resumed file may be made of two versions: fetch it once more in one piece
                    break
        raise FetchError(
            f"{download.url}: the file has the SHA-256 {sha256} instead of {download.sha256} and was deleted; {MIRROR}"
        )

    def _attempt(self, download: Download, expected: Version, part: PartialFile) -> None:
        """One request, which resumes where the last one ended. Raises: Transient, FetchError."""
        headers = {}
        if part.size and part.version.validator:
            headers = {"Range": f"bytes={part.size}-", "If-Range": part.version.validator}
        with self._open(download.url, "GET", headers, part) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise FetchError(
                    f"{download.url}: the server sends the file encoded, which was not requested; {MIRROR}"
                )
            if response.status == 200:
                part.begin(self._agreed(download, expected, response))
            elif response.status == 206 and continues(response.headers, part):
                part.resumed = True
            else:
                part.clear()
                raise Transient(f"{download.url}: the server did not send the requested bytes")
            self._copy(download.url, response, part)
        if part.version.size is None:  # the SHA-256 decides whether it is complete
            part.version = part.version._replace(size=part.size)
        if not part.complete:
            raise Transient(f"{download.url}: the connection ended after {part.size:,} of {part.version.size:,} bytes")

    def _agreed(self, download: Download, expected: Version, response: http.client.HTTPResponse) -> Version:
        """The version of a response with the whole file. Raises: FetchError if the file's length is not certain."""
        size, validator = response.length, Version.of(response.headers).validator
        if validator == expected.validator and expected.size is not None and not download.sha256:
            if size is None:
                size = expected.size
            elif size != expected.size:
                raise FetchError(
                    f"{download.url}: the server reports two lengths, {expected.size:,} and {size:,} bytes; {MIRROR}"
                )
        if size is None and not download.sha256:
            raise FetchError(
                f"{download.url}: the server does not report the file's length, so a cut-off file would go unnoticed; "
                "give its SHA-256 with --checksums"
            )
        return Version(size, validator)

    def _copy(self, url: str, response: http.client.HTTPResponse, part: PartialFile) -> None:
        left = response.length  # None: up to the end of the connection, or chunked, which marks its own end
        if left is not None:
            response.length += 1  # so that http.client also reads a byte beyond the announced length
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
            raise FetchError(f"{url}: the server sends more than the {size:,} bytes it announced; {MIRROR}")

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
                if error.code == 416 and part:  # the file is shorter than the part
                    part.clear()
                raise refusal(url, error) from error

    @contextlib.contextmanager
    def _network(self, url: str) -> Iterator[None]:
        """Turn network errors into Transient; errors of the disk are none of them."""
        try:
            yield
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise FetchError(f"{url}: the server's certificate is not valid ({reason.verify_message})") from error
            raise Transient(f"{url}: {str(reason) or type(reason).__name__}") from error

    def _with_retries(self, action: Callable, size: Callable[[], int] = lambda: 0) -> object:
        """The action's result, after retries if necessary. Whenever `size()` has grown, the count starts from 0."""
        failures, largest = 0, size()
        while True:
            try:
                return action()
            except Transient as error:
                if size() > largest:
                    failures, largest = 0, size()
                failures += 1
                if failures > self.retries:
                    raise FetchError(
                        f"{error} (gave up after attempt {failures}); run the same command again to resume; {MIRROR}"
                    ) from error
                wait = error.wait if error.wait is not None else self.retry_wait * 2 ** (failures - 1)
                if self.stop.wait(min(wait, LONGEST_WAIT)):
                    raise FetchError(f"{error}; stopped") from error


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, but from https only to https."""

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
    """Returns the address. Raises: FetchError if it is not an http or https address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise FetchError(f"{url} is not supported: only http:// and https:// addresses are")
    return url


def refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """The exception for an error response."""
    if error.code in (401, 403):
        return FetchError(
            f"{url}: permission denied ({error.code}); the host does not offer this file, or not to you; {MIRROR}"
        )
    if error.code in (404, 410):
        return FetchError(f"{url}: not found ({error.code}); {MIRROR}")
    if 300 <= error.code < 400:
        return FetchError(f"{url}: redirected ({error.code}) in a loop, to nowhere, or away from http and https")
    if error.code in (408, 416, 425, 429) or (error.code >= 500 and error.code != 501):
        wait = seconds_to_wait(error.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            return FetchError(f"{url}: the server is busy ({error.code}) and asks to retry in {wait:.0f} seconds")
        return Transient(f"{url}: the server answers {error.code} ({error.reason})", wait)
    return FetchError(f"{url}: the server answers {error.code} ({error.reason})")


def seconds_to_wait(header: str | None) -> float | None:
    """The seconds of a `Retry-After` header, which is a number or a date; None if it is absent or unreadable."""
    if header is None or header.strip().isdecimal():
        return None if header is None else float(header)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return None


def continues(headers: http.client.HTTPMessage, part: PartialFile) -> bool:
    """Whether a 206 response starts where the part ends and belongs to the same version."""
    span, _, total = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
    same = Version.of(headers).validator in (None, part.version.validator) if part.version else False
    return same and span.startswith(f"{part.size}-") and total in ("*", str(part.version.size))


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path, *known: str | None) -> None:
    """Rename a file whose SHA-256 is none of these, before another one gets its name."""
    if path.exists() and digest(path) not in known:
        names = (path.with_name(f"{path.name}.old-{i}") for i in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        path.rename(kept)
        print(f"{path} was there with other content, which is kept as {kept.name}")


@contextlib.contextmanager
def keeping_another(path: Path) -> Iterator[Path]:
    """As `replacing`, but another file that has this name is kept under a new one."""
    with replacing(path) as beside:
        yield beside
        if path.exists():  # else nobody need know the SHA-256
            set_aside(path, digest(beside))


def readable(size: int) -> str:
    """A number of bytes with a unit."""
    return tqdm.format_sizeof(size, "B", 1024)
