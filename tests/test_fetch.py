"""Downloads from a server that misbehaves: in the end the file is right, or absent with one sentence that says why."""

import errno
import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from email.utils import formatdate
from urllib.request import Request

import pytest

import fetch
from fetch import Download, Fetcher, FetchError, seconds_to_wait
from partial import PartialFile, Version
from tests.origin import ENVIRONMENT, ROOT, Origin, fault, running, serve, status
from tests.patience import HANG_SECONDS, wait_until

pytestmark = pytest.mark.processes

CONTENT = random.Random(0).randbytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]


@pytest.fixture
def origin():
    with running() as origin:
        origin.files["/file"] = CONTENT
        yield origin


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetcher(**changes) -> Fetcher:
    return Fetcher(**({"retry_wait": 0.001, "timeout": HANG_SECONDS, "retries": 3} | changes))


def get(origin: Origin, directory, sha256=None, **changes) -> bytes:
    target = directory / "file"
    fetcher(**changes).fetch([Download(f"{origin.url}/file", target, sha256)])
    assert os.listdir(directory) == ["file"]
    return target.read_bytes()


def refused(origin: Origin, directory, sha256=None, **changes) -> str:
    """The sentence; nothing is there."""
    with pytest.raises(FetchError) as caught:
        fetcher(**changes).fetch([Download(f"{origin.url}/file", directory / "file", sha256)])
    assert not (directory / "file").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 4095, 4096, 8192, 65_537, 100_000, 199_998, 199_999])
def test_a_dropped_connection_is_resumed(origin, tmp_path, at, reset):
    origin.faults["/file"] = [fault(cut=at, reset=reset)]
    assert get(origin, tmp_path) == CONTENT
    first, second = origin.asked("/file")
    assert first is None
    if not reset:  # what a RST overtakes is lost
        assert second == (f"bytes={at}-" if at else None)


def test_many_drops_do_not_exhaust_the_retries_as_long_as_something_comes(origin, tmp_path):
    offsets = [10, 2000, 2001, 30_000, 50_000, 70_000, 90_000, 110_000, 150_000, 199_000]
    origin.faults["/file"] = [fault(cut=offset) for offset in offsets]
    assert get(origin, tmp_path, retries=1) == CONTENT
    assert origin.asked("/file") == [None, *(f"bytes={offset}-" for offset in offsets)]


def test_a_server_that_always_drops_at_the_same_place(origin, tmp_path):
    origin.faults["/file"] = [fault(cut=1000)] * 99
    assert "ended after 1,000 of 200,000 bytes" in refused(origin, tmp_path)
    assert len(origin.asked("/file")) == 1 + 3
    assert (tmp_path / "file.part").stat().st_size == 1000  # the next run goes on here
    origin.faults["/file"] = []
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file")[-1] == "bytes=1000-"


def test_a_server_without_ranges(origin, tmp_path):
    origin.faults["/file"] = [fault(cut=1000, ranges=False), fault(cut=5000, ranges=False), fault(ranges=False)]
    assert get(origin, tmp_path) == CONTENT


def test_busy_twice(origin, tmp_path):
    origin.faults["/file"] = [status(503), status(503)]
    assert get(origin, tmp_path) == CONTENT


def test_waits_grow_unless_the_server_says_how_long(origin, tmp_path):
    class Recorder(threading.Event):
        waits: list[float] = []

        def wait(self, timeout=None):
            self.waits.append(timeout)
            return False

    origin.faults["/file"] = [status(503), status(500), status(429, Retry_After="7"), status(502)]
    get(origin, tmp_path, retries=4, retry_wait=0.5, stop=Recorder())
    assert Recorder.waits == [0.5, 1.0, 7.0, 4.0]


def test_retry_after():
    assert seconds_to_wait(None) is None and seconds_to_wait("soon") is None
    assert seconds_to_wait("30") == 30
    assert 3000 < seconds_to_wait(formatdate(time.time() + 3600, usegmt=True)) <= 3600


def test_a_server_that_asks_for_a_day(origin, tmp_path):
    origin.heads["/file"] = status(503, Retry_After="86400")
    origin.faults["/file"] = [status(503, Retry_After="86400")]
    assert "86400 seconds" in refused(origin, tmp_path)


@pytest.mark.parametrize("code, words", [(403, "permission denied"), (401, "permission denied"), (404, "not found")])
def test_refusals_name_the_mirror_flag_and_are_not_repeated(origin, tmp_path, code, words):
    origin.heads["/file"] = status(code)
    origin.faults["/file"] = [status(code)] * 9
    message = refused(origin, tmp_path)
    assert words in message and "--base_url" in message and f"{origin.url}/file" in message
    assert len(origin.asked("/file")) == 1


@pytest.mark.parametrize("head", [status(403), status(405), status(501), fault(length=None, etag=None)])
def test_a_server_that_refuses_head(origin, tmp_path, head):
    origin.heads["/file"] = head
    assert get(origin, tmp_path) == CONTENT


def test_a_file_that_changes_between_two_attempts(origin, tmp_path):
    def drop_and_change(handler, content):
        serve(handler, content, cut=5000)
        origin.files["/file"] = OTHER

    origin.faults["/file"] = [drop_and_change]
    assert get(origin, tmp_path) == OTHER
    assert origin.asked("/file") == [None, "bytes=5000-"]


def test_a_changed_file_from_a_server_that_ignores_if_range(origin, tmp_path):
    def drop_and_change(handler, content):
        serve(handler, content, cut=5000)
        origin.files["/file"] = OTHER

    origin.faults["/file"] = [drop_and_change, fault(if_range=False)]
    assert get(origin, tmp_path) == OTHER


def test_a_changed_length_is_another_file(origin, tmp_path):
    def drop_and_change(handler, content):
        serve(handler, content, cut=5000)
        origin.files["/file"] = OTHER + b"more"

    origin.faults["/file"] = [drop_and_change, fault(if_range=False, etag=None, modified=None)]
    assert get(origin, tmp_path) == OTHER + b"more"


@pytest.mark.parametrize("etag, modified", [(None, None), ('W/"1"', None)])
def test_nothing_is_resumed_without_a_strong_validator(origin, tmp_path, etag, modified):
    origin.heads["/file"] = fault(etag=etag, modified=modified)
    origin.faults["/file"] = [fault(cut=5000, etag=etag, modified=modified)]
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file") == [None, None]


def test_a_date_resumes_where_there_is_no_strong_etag(origin, tmp_path):
    origin.faults["/file"] = [fault(cut=5000, etag='W/"1"'), fault(etag='W/"1"')]
    origin.heads["/file"] = fault(etag='W/"1"')
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file") == [None, "bytes=5000-"]


def test_a_server_that_promises_too_much(origin, tmp_path):
    origin.heads["/file"] = fault(length=200_100)
    origin.faults["/file"] = [fault(length=200_100, ranges=False)] * 9
    assert "ended after 200,000 of 200,100 bytes" in refused(origin, tmp_path)


def test_a_server_that_promises_too_little(origin, tmp_path):
    origin.heads["/file"] = fault(length=150_000)
    origin.faults["/file"] = [fault(length=150_000)]
    assert "sends more than the 150,000 bytes it announced" in refused(origin, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_names_two_lengths(origin, tmp_path):
    origin.heads["/file"] = fault(length=150_000)
    assert "two lengths, 150,000 and 200,000 bytes" in refused(origin, tmp_path)
    assert get(origin, tmp_path, SHA256) == CONTENT  # a checksum decides


def chunked(handler, content, cut=None):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    if handler.command == "GET":
        body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (content[:70_000], content[70_000:])) + b"0\r\n\r\n"
        handler.wfile.write(body[:cut])
    handler.close_connection = True


def test_a_file_of_unknown_length_needs_a_checksum(origin, tmp_path):
    origin.heads["/file"] = chunked
    origin.faults["/file"] = [chunked, chunked]
    assert "--checksums" in refused(origin, tmp_path)
    origin.faults["/file"] = [chunked, lambda handler, content: chunked(handler, content, 60_000), chunked]
    assert get(origin, tmp_path, SHA256) == CONTENT


def test_chunks_of_a_file_whose_length_head_knows(origin, tmp_path):
    origin.heads["/file"] = fault(etag=None, modified=None)
    origin.faults["/file"] = [lambda handler, content: chunked(handler, content, 60_000), chunked]
    assert get(origin, tmp_path) == CONTENT
    origin.files["/file"] = CONTENT + b"more"
    origin.heads["/file"] = fault(etag=None, modified=None, length=len(CONTENT))
    origin.faults["/file"] = [chunked]
    (tmp_path / "file").unlink()
    assert "sends more" in refused(origin, tmp_path)


def test_a_part_that_the_server_takes_for_too_long(origin, tmp_path):
    origin.faults["/file"] = [fault(cut=5000), status(416)]
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file") == [None, "bytes=5000-", None]


def test_an_encoded_answer_is_not_the_file(origin, tmp_path):
    origin.faults["/file"] = [fault(Content_Encoding="gzip")]
    assert "encoded" in refused(origin, tmp_path)


def test_wrong_bytes_are_thrown_away(origin, tmp_path):
    origin.files["/file"] = OTHER
    message = refused(origin, tmp_path, SHA256)
    assert SHA256 in message and hashlib.sha256(OTHER).hexdigest() in message
    assert os.listdir(tmp_path) == []
    assert len(origin.asked("/file")) == 1  # in one piece: fetching it again would not help


def test_wrong_pieces_are_fetched_again_in_one(origin, tmp_path):
    # the server takes no notice of a change: same validator, other bytes
    origin.heads["/file"] = fault(etag='"same"')
    origin.faults["/file"] = [
        lambda handler, _: serve(handler, OTHER, cut=5000, etag='"same"'),
        fault(etag='"same"'),
        fault(etag='"same"'),
    ]
    assert get(origin, tmp_path, SHA256) == CONTENT
    assert origin.asked("/file") == [None, "bytes=5000-", None]


def test_redirects_lead_to_web_addresses_only(origin, tmp_path):
    for place, words in [
        ("/elsewhere", "not found"),
        ("file:///etc/passwd", "away from http"),
        ("ftp://127.0.0.1/file", "only http"),
        ("data:text/plain,x", "away from http"),
        ("/file", "in a loop"),
    ]:
        origin.heads["/file"] = status(302, Location=place)
        origin.faults["/file"] = [status(302, Location=place)] * 20
        assert words in refused(origin, tmp_path)
    origin.files["/elsewhere"] = CONTENT
    for code in (301, 302, 303, 307, 308):
        origin.heads["/file"] = status(code, Location="/elsewhere")
        origin.faults["/file"] = [status(code, Location="/elsewhere")]
        assert get(origin, tmp_path) == CONTENT
        (tmp_path / "file").unlink()
    assert len(origin.asked("/elsewhere", "HEAD")) == 6


def test_a_redirect_away_from_https_is_refused():
    with pytest.raises(FetchError, match="from https to http://b/"):
        fetch.WebRedirects().redirect_request(Request("https://a/"), None, 302, "", {}, "http://b/")
    following = fetch.WebRedirects().redirect_request(Request("https://a/"), None, 302, "", {}, "https://b/")
    assert following.full_url == "https://b/"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "data:,x", "/etc/passwd", "http:///file"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(FetchError, match="only http"):
        fetcher().fetch([Download(url, tmp_path / "file")])
    assert os.listdir(tmp_path) == []


def test_what_is_there_and_right_is_left_alone(origin, tmp_path):
    assert get(origin, tmp_path) == CONTENT
    before = (tmp_path / "file").stat()
    assert get(origin, tmp_path) == CONTENT
    origin.log.clear()
    assert get(origin, tmp_path, SHA256) == CONTENT
    assert origin.log == []  # the checksum is enough
    assert (tmp_path / "file").stat() == before


def test_what_is_there_and_wrong_is_replaced_at_the_end_only(origin, tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    origin.faults["/file"] = [fault(cut=10)] * 9
    with pytest.raises(FetchError, match="ended after"):
        get(origin, tmp_path)
    assert (tmp_path / "file").read_bytes() == b"short"
    origin.faults["/file"] = []
    assert get(origin, tmp_path) == CONTENT
    (tmp_path / "file").write_bytes(OTHER)
    assert get(origin, tmp_path, SHA256) == CONTENT


def test_a_directory_in_the_way(origin, tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(FetchError, match="is a directory"):
        fetcher().fetch([Download(f"{origin.url}/file", tmp_path / "file")])


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_files(origin, tmp_path, size):
    origin.files["/file"] = CONTENT[:size]
    assert get(origin, tmp_path) == CONTENT[:size]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_fetched(origin, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 300_000))
    origin.files["/other"] = CONTENT
    both = [Download(f"{origin.url}/{name}", tmp_path / name) for name in ("file", "other")]
    with pytest.raises(FetchError, match=r"391kB are needed, but only 293kB are free"):
        fetcher().fetch(both)
    assert origin.asked("/file") == [] and os.listdir(tmp_path) == []
    with PartialFile(tmp_path / "file", len_of := [].append) as part:  # what is there already need not fit again
        part.begin(Version(len(CONTENT), '"' + hashlib.md5(CONTENT).hexdigest() + '"'))
        part.append(CONTENT[:150_000])
    assert fetcher().fetch(both) == set(both) and len_of
    assert origin.asked("/file") == ["bytes=150000-"]


def test_a_full_disk_is_not_taken_for_a_bad_line(origin, tmp_path, monkeypatch):
    def full(self, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartialFile, "append", full)
    with pytest.raises(OSError, match="No space left"):
        get(origin, tmp_path)
    assert len(origin.asked("/file")) == 1


def test_several_files_at_a_time(origin, tmp_path):
    barrier = threading.Barrier(3, timeout=HANG_SECONDS)  # answers none before three are asked for

    def together(handler, content):
        barrier.wait()
        serve(handler, content)

    names = ["a", "b", "c"]
    for name in names:
        origin.files[f"/{name}"] = name.encode() * 1000
        origin.faults[f"/{name}"] = [together]
    fetcher(parallel=3).fetch([Download(f"{origin.url}/{name}", tmp_path / name) for name in names])
    assert [(tmp_path / name).read_bytes() for name in names] == [name.encode() * 1000 for name in names]


def test_the_first_error_stops_the_others(origin, tmp_path):
    """The other download's connection breaks after that, and it would ask again in a minute: it ends instead."""
    begun, stop = threading.Event(), threading.Event()

    def slow(handler, content):
        serve(handler, content, cut=1000)
        begun.set()
        stop.wait(HANG_SECONDS)

    def denied(handler, content):
        begun.wait(HANG_SECONDS)
        status(403)(handler, content)

    origin.files["/slow"] = CONTENT
    origin.faults["/slow"] = [slow]
    origin.faults["/file"] = [denied]
    with pytest.raises(FetchError, match="permission denied"):
        fetcher(stop=stop, retry_wait=60).fetch(
            [Download(f"{origin.url}/{name}", tmp_path / name) for name in ("slow", "file")]
        )
    assert sorted(os.listdir(tmp_path)) == ["slow.part", "slow.part.json"] and len(origin.asked("/slow")) == 1


def test_a_silent_server_is_asked_again(origin, tmp_path):
    gone = threading.Event()

    def silent(handler, content):
        serve(handler, content, cut=1000)
        handler.wfile.flush()
        gone.wait(HANG_SECONDS)

    origin.faults["/file"] = [silent]
    # on a busy machine the server may be silent for that long more often than it is told to
    assert get(origin, tmp_path, timeout=0.5, retries=1000) == CONTENT
    gone.set()
    assert len(origin.asked("/file")) > 1


def test_one_process_at_a_time_fetches_a_file(origin, tmp_path):
    with open(tmp_path / "file.part", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(origin, tmp_path)
    assert get(origin, tmp_path) == CONTENT


def test_a_link_is_not_written_through(origin, tmp_path):
    victim, directory = tmp_path / "victim", tmp_path / "data"
    directory.mkdir()
    victim.write_bytes(b"precious")
    (directory / "file.part").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        get(origin, directory)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"size": 200000}', b'{"size": 200000, "validator": "other"}'])
def test_a_part_of_unknown_origin_is_not_gone_on_with(origin, tmp_path, note):
    (tmp_path / "file.part").write_bytes(OTHER[:5000])
    (tmp_path / "file.part.json").write_bytes(note)
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file") == [None]


def test_a_killed_process_is_gone_on_with(origin, tmp_path):
    gone = threading.Event()

    def stall(handler, content):
        serve(handler, content, cut=120_000)
        handler.wfile.flush()
        gone.wait(HANG_SECONDS)

    origin.faults["/file"] = [stall]
    code = (
        "import sys; from pathlib import Path; from fetch import Download, Fetcher; "
        "Fetcher().fetch([Download(sys.argv[1], Path(sys.argv[2]))])"
    )
    command = [sys.executable, "-c", code, f"{origin.url}/file", str(tmp_path / "file")]
    process = subprocess.Popen(command, cwd=ROOT / "preprocessing", env=ENVIRONMENT)
    part = tmp_path / "file.part"
    wait_until(
        lambda: part.exists() and part.stat().st_size > 50_000,
        "the first bytes of the file",
        lambda: process.poll() is None,
    )
    process.kill()
    process.wait()
    gone.set()
    held = part.stat().st_size
    assert 50_000 < held <= 120_000 and not (tmp_path / "file").exists()
    assert get(origin, tmp_path) == CONTENT
    assert origin.asked("/file")[1:] == [f"bytes={held}-"]
