"""download_corpus.py, download_model.py and download_index.py as users type them, against a server on loopback."""

import hashlib
import random
import signal
import subprocess
import sys
import threading

import pytest

import sources
from tests.origin import ENVIRONMENT, ROOT, fault, one_sentence, run_script, running, serve, status, storm
from tests.patience import HANG_SECONDS, wait_until

pytestmark = pytest.mark.processes

RELEASED = {"corpus": sources.CORPORA, "model": sources.MODELS, "index": sources.INDICES}
ANNOUNCED = {"corpus": "corpora/wiki/enwiki-dec2018", "model": "models/atlas/xl", "index": "indices/atlas/wiki/xl"}
MODEL = "/models/atlas/base/model.pth.tar"
QUICK = ("--retry_wait", "0.001")


@pytest.fixture
def origin():
    with running() as origin:
        for kind, key in ANNOUNCED.items():
            for file in RELEASED[kind][key]:
                origin.files[f"/{key}/{file}"] = f"{key}/{file}\n".encode() * 50
        origin.files[MODEL] = random.Random(0).randbytes(100_000)
        yield origin


def download(kind, origin, directory, *words):
    return run_script(f"download_{kind}", "--output_directory", directory, "--base_url", origin.url, *QUICK, *words)


def files_in(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_addresses():
    keys = [key for released in RELEASED.values() for key in released]
    assert sources.RELEASED == "https://dl.fbaipublicfiles.com/atlas"
    assert len(sources.CORPORA) == 5 and len(sources.MODELS) == len(sources.INDICES) == 8
    assert all(len(files) == 256 for files in sources.INDICES.values())
    assert sources.INDICES["indices/atlas_nq/wiki/base"][-1] == "embeddings.127.pt"
    assert len(set(keys)) == 21
    originals = [*sources.QA, *sources.FEVER, *sources.MMLU, *sources.TEMPLAMA]
    assert len({address.rpartition("/")[2] for address in originals}) == len(originals)  # one mirror can have them all


@pytest.mark.parametrize("kind", RELEASED)
def test_list(kind):
    done = run_script(f"download_{kind}", "--list")
    assert done.returncode == 0 and done.stdout.splitlines() == list(RELEASED[kind])


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("named", [True, False])
def test_the_announced_commands(origin, tmp_path, kind, named):
    key = ANNOUNCED[kind]
    words = [f"--{kind}", key] if named else [key]
    done = download(kind, origin, tmp_path, *words)
    assert done.returncode == 0 and done.stderr == ""
    number = len(RELEASED[kind][key])
    assert f"{number} fetched, 0 up to date" in done.stdout
    expected = {path[1:]: content for path, content in origin.files.items() if path.startswith(f"/{key}/")}
    assert files_in(tmp_path) == expected and len(expected) == number
    again = download(kind, origin, tmp_path, *words)
    assert again.returncode == 0 and f"0 fetched, {number} up to date" in again.stdout
    assert all(len(origin.asked(f"/{name}")) == 1 for name in expected)


def test_two_keys(origin, tmp_path):
    done = download("model", origin, tmp_path, "models/atlas/base", "models/atlas/xl")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert set(files_in(tmp_path)) == {"models/atlas/base/model.pth.tar", "models/atlas/xl/model.pth.tar"}


def test_ten_drops(origin, tmp_path):
    origin.faults[MODEL] = [fault(cut=10_000 * i + 7, reset=i % 2 == 1) for i in range(10)]
    done = download("model", origin, tmp_path, "models/atlas/base")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {MODEL[1:]: origin.files[MODEL]}


@pytest.mark.parametrize("kind", RELEASED)
def test_a_storm(origin, tmp_path, kind):
    key = ANNOUNCED[kind]
    name = f"{key}/{RELEASED[kind][key][-1]}"
    origin.faults[f"/{name}"] = storm(len(origin.files[f"/{name}"]))
    done = download(kind, origin, tmp_path, key)
    assert done.returncode == 0, done.stderr
    expected = {path[1:]: content for path, content in origin.files.items() if path.startswith(f"/{key}/")}
    assert files_in(tmp_path) == expected and origin.faults[f"/{name}"] == []


EVERY_SCRIPT = {  # words, and the files that they ask for
    f"download_{kind}": ([key], [f"{key}/{file}" for file in RELEASED[kind][key]]) for kind, key in ANNOUNCED.items()
}
for name in ("qa", "fever", "mmlu", "templama"):
    EVERY_SCRIPT[f"prepare_{name}"] = ([], [url.rpartition("/")[2] for url in getattr(sources, name.upper())])


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_every_script_against_a_server_that_lies(tmp_path, script):
    """About the length, too long or too short, and about the bytes: nothing is there in the end, and it is said why."""
    keys, names = EVERY_SCRIPT[script]
    name = names[0]
    with running() as origin:
        origin.files |= {f"/{name}": b"x" * 5000 for name in names}
        sums = tmp_path / "sums"
        sums.write_text("".join(f"{hashlib.sha256(b'other').hexdigest()}  {name}\n" for name in names))
        for length, words, sentence in (
            (5001, (), "the connection ended after 5,000 of 5,001 bytes"),
            (4999, (), "the server sends more than the 4,999 bytes it announced"),
            (5000, ("--checksums", sums), "the file has the SHA-256"),
        ):
            origin.heads[f"/{name}"] = fault(length=length)
            origin.faults[f"/{name}"] = [fault(length=length, ranges=False)] * 9
            words = [*keys, "--output_directory", tmp_path / "data", "--base_url", origin.url, *QUICK, *words]
            message = one_sentence(run_script(script, *words, "--parallel", "1", "--retries", "1"))
            assert sentence in message and f"{origin.url}/" in message, message
            left = {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()}
            assert name.rpartition("/")[2] not in left
            assert not list((tmp_path / "data").rglob("*_data/*"))


def test_permission_denied(origin, tmp_path):
    origin.heads[MODEL] = status(403)
    origin.faults[MODEL] = [status(403)]
    message = one_sentence(download("model", origin, tmp_path, "models/atlas/base"))
    assert "permission denied (403)" in message and "--base_url" in message and origin.url + MODEL in message
    assert files_in(tmp_path) == {}


def test_a_missing_file(origin, tmp_path):
    message = one_sentence(download("model", origin, tmp_path, "models/atlas/xxl"))
    assert "not found (404)" in message and "models/atlas/xxl/model.pth.tar" in message


def test_nobody_answers(tmp_path):
    with running() as origin:
        gone = origin
    message = one_sentence(download("model", gone, tmp_path, "models/atlas/base", "--retries", "2"))
    assert "refused" in message and "attempt 3" in message


def test_a_disk_that_is_too_small(origin, tmp_path):
    origin.heads[MODEL] = fault(length=10**17)
    message = one_sentence(download("model", origin, tmp_path, "models/atlas/base"))
    assert "are needed" in message and "free" in message
    assert origin.asked(MODEL) == [] and files_in(tmp_path) == {}


def test_interrupted(origin, tmp_path):
    """While the server is silent, for which a download would wait an hour."""
    gone = threading.Event()

    def stall(handler, content):
        serve(handler, content, cut=70_000)
        gone.wait(HANG_SECONDS)

    origin.faults[MODEL] = [stall]
    words = ["models/atlas/base", "--output_directory", str(tmp_path), "--base_url", origin.url, "--timeout", "3600"]
    process = subprocess.Popen(
        [sys.executable, "preprocessing/download_model.py", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / (MODEL[1:] + ".part")
    wait_until(
        lambda: part.exists() and part.stat().st_size, "the first bytes of the file", lambda: process.poll() is None
    )
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=HANG_SECONDS)
    gone.set()
    assert process.returncode == 1 and complaint == "stopped; run the same command again to resume\n"
    assert download("model", origin, tmp_path, "models/atlas/base").returncode == 0
    assert files_in(tmp_path) == {MODEL[1:]: origin.files[MODEL]}
    first, second = origin.asked(MODEL)
    assert first is None and second.startswith("bytes=")


def test_checksums(origin, tmp_path):
    right = hashlib.sha256(origin.files[MODEL]).hexdigest()
    sums, data = tmp_path / "sums", tmp_path / "data"
    words = ("models/atlas/base", "--checksums", sums)
    sums.write_text(f"# ours\n{'0' * 64} *./{MODEL[1:]}\n")
    message = one_sentence(download("model", origin, data, *words))
    assert right in message and "0" * 64 in message and files_in(data) == {}
    sums.write_text(f"{right}  {MODEL[1:]}\n")
    assert download("model", origin, data, *words).returncode == 0
    (data / MODEL[1:]).write_bytes(b"x" * 100_000)  # the right length
    assert download("model", origin, data, *words).returncode == 0
    assert files_in(data) == {MODEL[1:]: origin.files[MODEL]}
    sums.write_text(f"{right}  elsewhere\n")
    assert f"no line for {MODEL[1:]}" in one_sentence(download("model", origin, data, *words))
    for line in (f"{right}", "abc  file", f"{right[:-1]}g  file", f"SHA256 (file) = {right}"):
        sums.write_text(f"\n{line}\n")
        assert f"{sums}, line 2" in one_sentence(download("model", origin, data, *words))
    assert "No such file" in one_sentence(download("model", origin, data, words[0], "--checksums", "nowhere"))


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "no --model given"),
        (["models/atlas/xs"], "there is no model models/atlas/xs"),
        (["--model", "corpora/wiki/enwiki-dec2018"], "choose from models/atlas/base"),
        (["models/atlas/xl", "--base_url", "file:///srv"], "only http:// and https://"),
        (["models/atlas/xl", "--base_url", "/srv"], "only http:// and https://"),
        (["models/atlas/xl", "--parallel", "0"], "0 is no number of at least 1"),
        (["models/atlas/xl", "--timeout", "inf"], "inf is no number of at least 0.01"),
        (["models/atlas/xl", "--timeout", "nan"], "no number of at least 0.01"),
    ],
)
def test_wrong_flags(tmp_path, words, expected):
    done = run_script("download_model", "--output_directory", tmp_path / "data", *words)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
