"""ask.py --serve: the page in a browser, the endpoints, who is refused, many at the same time, and how it stops."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import atlas
from atlas.asking.server import MOST_BYTES, Server, serve
from atlas.asking.waiting import Closed, Full, Waiting
from tests.browser import browsing, find_browser
from tests.kit import read_jsonl, run, world
from tests.patience import HANG_SECONDS, wait_until

ROOT = Path(__file__).resolve().parent.parent
JSON = {"Content-Type": "application/json"}
AT_ONCE = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    training = {"train_retriever": True, "query_side_retriever_training": True, "total_steps": 1}
    run(home, eval_data=None, save_index_path=home / "index", per_gpu_eval_batch_size=8, **training)
    return home


@pytest.fixture(scope="module")
def server(home):
    server = Server(atlas.load(home / "run", device="cpu"), "127.0.0.1", 0)
    with server.running():
        yield server


@pytest.fixture(scope="module")
def questions():
    return [row["question"] for name in ("dev", "train") for row in read_jsonl(world() / f"{name}.jsonl")]


def request(server, method, path, body=None, headers=JSON):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=HANG_SECONDS)
    try:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, headers if body is not None else headers | {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def post(server, path, body):
    status, _, content = request(server, "POST", path, body)
    assert status == 200, content
    return json.loads(content)


def timeless(answer):
    assert list(answer["seconds"]) == ["embed", "search", "read", "judge"]
    return answer | {"seconds": {}}


@pytest.mark.processes
def test_ask(server, questions):
    expected = timeless(server.model.ask(questions[0], k=2).to_dict())
    assert timeless(post(server, "/ask", {"question": questions[0], "k": 2})) == expected
    assert len(post(server, "/ask", {"question": questions[0]})["passages"]) == server.model.k == 4


@pytest.mark.processes
def test_retrieve_as_search_r1_calls_it(server, questions):
    body = {"queries": questions[:3], "topk": 2, "return_scores": True}
    (first, *_), *others = post(server, "/retrieve", body)["result"]
    assert len(others) == 2
    best = server.model.search(questions[:3], k=2)[0][0]
    assert first["score"] == best.score
    assert first["document"] == best.fields | {"contents": f'"{best.title}"\n{best.text}'} and best.id and best.text
    plain = post(server, "/retrieve", {"queries": questions[:1], "topk": 2})
    assert plain["result"][0][0] == first["document"] and len(plain["result"][0]) == 2
    assert post(server, "/retrieve", {"queries": [], "topk": None}) == {"result": []}


@pytest.mark.processes
def test_the_page_asks_nobody_else(server):
    status, headers, content = request(server, "GET", "/")
    page, policy = content.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    assert f"script-src 'nonce-{nonce}'" in policy and "default-src 'none'" in policy
    assert nonce not in request(server, "GET", "/")[2].decode()
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page and "eval(" not in page
    about = json.loads(request(server, "GET", "/about")[2])
    assert about["passages"] == 300 and about["counts"] == [1, 4, 5, 10, 20, 40] and len(about["examples"]) == 5


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the request is not JSON in UTF-8"),
        (b"\xff", 400, "the request is not JSON in UTF-8"),
        (b"[" * 100_000, 400, "the request is not JSON in UTF-8"),
        (b'{"question": "\\ud800"}', 400, "the request is not JSON in UTF-8"),
        ([], 400, "the request must be an object of JSON"),
        ({}, 400, "`question` must be a text"),
        ({"question": " "}, 400, "`question` is empty"),
        ({"question": "q", "k": 0}, 400, "`k` must be a number of passages from 1 to 200"),
        ({"question": "q", "k": True}, 400, "`k` must be a number"),
        ({"question": "q", "top": 3}, 400, "there is no field `top`: a request has question, k"),
        ({"queries": "q"}, 400, "`queries` must be a list of texts"),
        ({"queries": ["q", 3]}, 400, "`queries[1]` must be a text"),
        ({"queries": ["q"], "topk": 10**9}, 400, "`topk` must be a number of passages from 1 to 1000"),
        ({"queries": ["q"], "return_scores": "yes"}, 400, "`return_scores` must be true or false"),
    ],
)
def test_mistakes(server, body, status, sentence):
    path = "/retrieve" if isinstance(body, dict) and "queries" in body else "/ask"
    found, _, content = request(server, "POST", path, body)
    assert found == status and sentence in json.loads(content)["error"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "sentence"),
    [
        ("GET", "/", {"Host": "evil.example"}, 403, "`Host`"),
        ("GET", "/", {"Host": "127.0.0.1.evil.example:80"}, 403, "`Host`"),
        ("GET", "/", {"Host": "]"}, 403, "`Host`"),
        ("POST", "/ask", JSON | {"Host": "evil.example"}, 403, "`Host`"),
        ("POST", "/ask", {"Content-Type": "text/plain"}, 415, "application/json"),
        ("POST", "/ask", {}, 415, "application/json"),
        ("POST", "/ask", JSON | {"Content-Length": str(MOST_BYTES + 1)}, 413, "at most 8 MiB"),
        ("POST", "/ask", JSON | {"Content-Length": "9" * 5000}, 413, "at most 8 MiB"),
        ("POST", "/ask", JSON | {"Content-Length": "-1"}, 411, "Content-Length"),
        ("POST", "/ask", JSON | {"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
        ("GET", "/ask", {}, 405, "/ask takes POST"),
        ("POST", "/", JSON, 405, "/ takes GET"),
        ("GET", "/../etc/passwd", {}, 404, "there is only"),
        ("GET", "http://[::1", {}, 400, "the address of the request cannot be read"),
        ("DELETE", "/", {}, 501, "unsupported method"),
    ],
)
def test_who_is_refused(server, method, path, headers, status, sentence):
    """Also without a body: nothing is read of a request that is refused."""
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in ({"Host": "localhost"} | headers).items()]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=HANG_SECONDS) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        content = json.loads(response.read())
    assert response.status == status and sentence in content["error"]


@pytest.mark.processes
@pytest.mark.parametrize("path", ["/about", "/nowhere", "/", "/ask"])
def test_what_is_not_read_of_a_request_is_not_the_next_one(server, path, questions):
    """A site may let a browser send any text: what follows in it must not be obeyed."""
    asked = json.dumps({"question": questions[0]})
    hidden = "\r\n".join(
        ["POST /ask HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(asked)}", ""]
    )
    hidden += f"\r\n{asked}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: {len(hidden)}"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=HANG_SECONDS) as connection:
        connection.sendall(f"{head}\r\n\r\n{hidden}".encode())
        said = b""
        while part := connection.recv(1 << 16):  # until the server hangs up
            said += part
    assert said.count(b"HTTP/1.1 ") == 1 and b"HTTP/1.1 200" not in said, said


@pytest.mark.processes
@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8000", "192.0.2.7:80"])
def test_names_of_this_machine(server, host):
    assert request(server, "GET", "/about", headers={"Host": host})[0] == 200


@pytest.mark.processes
def test_a_bug_is_an_answer_and_the_next_request_is_served(server, questions, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server.waiting, "work", lambda *_: 1 / 0)
        status, _, content = request(server, "POST", "/ask", {"question": questions[0]})
        assert status == 500 and json.loads(content) == {"error": "ZeroDivisionError: division by zero"}
        patch.setattr(server.waiting, "work", lambda *_: Path("/dev/null/x").read_text())
        status, _, content = request(server, "POST", "/retrieve", {"queries": questions[:1]})
        assert status == 500 and json.loads(content) == {"error": "/dev/null/x: Not a directory"}
    assert post(server, "/ask", {"question": questions[0]})["answer"]


@pytest.mark.processes
def test_many_at_the_same_time(server, questions, monkeypatch):
    """Everybody gets the answer to their own question, and those that wait together are done together."""
    sizes, work, alone = [], server.waiting.work, [found[0].id for found in server.model.search(questions, k=1)]

    def counted(kind, items):
        if not sizes:  # the first waits for all others, so that they wait together on any machine
            wait_until(lambda: len(server.waiting._requests) + len(items) == AT_ONCE, "the requests")
        sizes.append(len(items))
        return work(kind, items)

    monkeypatch.setattr(server.waiting, "work", counted)
    ready = threading.Barrier(AT_ONCE)

    def client(number):
        i = number % len(questions)
        ready.wait(HANG_SECONDS)
        if number % 10 == 0:
            answer = post(server, "/ask", {"question": questions[i], "k": 1})
            return answer["question"] == questions[i] and answer["passages"][0]["id"] == alone[i]
        (found,) = post(server, "/retrieve", {"queries": [questions[i]], "topk": 1})["result"]
        return found[0]["id"] == alone[i]

    with ThreadPoolExecutor(AT_ONCE) as clients:
        assert all(clients.map(client, range(AT_ONCE)))
    assert sum(sizes) == AT_ONCE and len(sizes) < AT_ONCE / 2 and max(sizes) == server.model.batch_size == 8


def blocked(**limits):
    """Work that waits for an event, and what it was given."""
    begun, go, done = threading.Event(), threading.Event(), []

    def work(kind, items):
        done.append((kind, items))
        begun.set()
        assert go.wait(HANG_SECONDS)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    waiting = Waiting(work, **{"most_together": 3, "most_waiting": 5} | limits)
    first = waiting.submit("a", ["first"])
    assert begun.wait(HANG_SECONDS)
    return waiting, go, done, first


def test_those_of_a_kind_are_done_together_in_order():
    waiting, go, done, _ = blocked()
    futures = [waiting.submit(kind, list(items)) for kind, items in (("a", "x"), ("b", "y"), ("a", "zuv"), ("a", "w"))]
    go.set()
    assert [future.result(HANG_SECONDS) for future in futures] == [["X"], ["Y"], ["Z", "U", "V"], ["W"]]
    assert done[1:] == [("a", ["x", "w"]), ("b", ["y"]), ("a", ["z", "u", "v"])]
    waiting.close()


def test_the_error_of_one_is_not_that_of_the_others():
    waiting, go, _, first = blocked()
    futures = [waiting.submit("a", [item]) for item in ("x", "bad", "y")]
    go.set()
    assert (futures[0].result(HANG_SECONDS), futures[2].result(HANG_SECONDS)) == (["X"], ["Y"])
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(HANG_SECONDS)
    assert first.result(HANG_SECONDS) == ["FIRST"]
    waiting.close()


def test_who_waits_is_told_that_it_is_full_or_over():
    waiting, go, _, first = blocked(most_waiting=1)
    second = waiting.submit("a", ["x"])
    with pytest.raises(Full):
        waiting.submit("a", ["y"])
    closing = threading.Thread(target=waiting.close)
    closing.start()
    wait_until(lambda: waiting._closed, "it is closed")
    go.set()
    closing.join()
    assert first.result(HANG_SECONDS) == ["FIRST"]
    for late in (second.result, lambda: waiting.submit("a", ["z"])):
        with pytest.raises(Closed):
            late()


@pytest.mark.processes
@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.name.invalid"])
def test_nothing_can_listen_there(server, host):
    with pytest.raises(OSError, match=rf"--host {host} --port {server.server_port}: nothing can listen there"):
        serve(server.model, host, server.server_port)


@pytest.mark.processes
def test_it_stops_when_it_is_told_to(home, tmp_path, questions):
    """The address is the only line on standard output; a connection that waits does not hold it up."""
    words = [sys.executable, ROOT / "ask.py", home / "run", "--serve", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, words)], cwd=tmp_path, env=environment, **pipes)
    try:
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)
        connection.request("POST", "/ask", json.dumps({"question": questions[0]}), JSON)
        assert json.loads(connection.getresponse().read())["question"] == questions[0]
        process.send_signal(signal.SIGTERM)
        output, said = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "") and said.endswith("Stopping\n") and "Traceback" not in said


@pytest.mark.processes
def test_make_ask_says_what_is_missing(tmp_path):
    words = ["make", "--no-print-directory", "-f", ROOT / "Makefile", "ask"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "There is no demo to ask yet: make demo\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.processes
@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium in PATH")
def test_the_page_in_a_browser(server, questions, tmp_path):
    """Asked with the keyboard and with the mouse, light and dark, wide and narrow; nothing of a text is run."""
    with browsing(tmp_path / "profile") as tab:
        tab.look(1280)
        tab.open(f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for("!document.querySelector('#examples').hidden")
        tab.type(questions[0])
        assert tab.value("document.querySelector('#examples').hidden")
        tab.press("Enter", 13)
        tab.wait_for("!document.querySelector('#result').hidden")
        answer = server.model.ask(questions[0])
        assert tab.value("document.querySelector('#answer').textContent") == (answer.text or "(an empty answer)")
        texts = tab.value("[...document.querySelectorAll('#passages .text')].map((e) => e.textContent)")
        assert texts == [passage.text for passage in answer.passages]
        sources = tab.value("[...document.querySelectorAll('.source')].map((e) => e.textContent)")
        fields = [passage.fields for passage in answer.passages]
        titles = [passage["title"].removesuffix(f": {passage['section']}") for passage in fields]
        expected = [f"{t}{p['section']} · {p['id']}" for t, p in zip(titles, fields, strict=True)]
        assert sources == expected
        widths = tab.value("[...document.querySelectorAll('rect.judgement')].map((e) => e.getAttribute('width') / 100)")
        assert widths == pytest.approx([passage.judgement for passage in answer.passages], abs=1e-4)
        assert Counter(
            re.findall(r"embed|search|read|judge", tab.value("document.querySelector('#facts').textContent"))
        )

        tab.click("#counts input[value='10']")
        tab.wait_for("document.querySelectorAll('#passages li').length === 10")
        tab.look(390, dark=True)
        assert tab.value("document.documentElement.scrollWidth") == 390
        dark = tab.value("getComputedStyle(document.body).backgroundColor")
        tab.look(390)
        assert dark != tab.value("getComputedStyle(document.body).backgroundColor")

        tab.open(f"http://127.0.0.1:{server.server_port}/?again")
        tab.wait_for("document.querySelectorAll('#examples button').length === 5")
        tab.click("#examples li:nth-child(2) button")
        tab.wait_for("!document.querySelector('#result').hidden")
        assert tab.value("document.querySelector('#question').value") == server.examples[1]

        tab.value(
            "show({answer: '<img src=x onerror=evil()>', score: 1, seconds: {}, passages: [{title: '<b>t</b>', "
            "text: '𝔸 <i>evil</i>', id: 'x', score: 1, judgement: 1, attention: null, marks: [[5, 9]]}]})"
        )
        assert tab.value("document.querySelector('#answer').textContent") == "<img src=x onerror=evil()>"
        assert tab.value("document.querySelector('mark').textContent") == "evil"
        assert tab.errors == []
