"""A model over HTTP: a page for browsers, POST /ask, and POST /retrieve in the form that Search-R1's trainers call.

Only programs and pages of the same origin get answers: a request must name this machine as its `Host`, so that no
other site can reach the server through a name of its own (DNS rebinding), and bring JSON as its content type, which
browsers let no other site send without asking.
"""

import ipaddress
import json
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from atlas.asking.model import AnsweringModel
from atlas.asking.waiting import Closed, Full, Waiting
from atlas.report.page import fill
from atlas.runtime.session import is_understood, sentence_of
from atlas.runtime.tracking import log

MOST_BYTES = 8 << 20  # of a request
MOST_READ, MOST_FOUND = 200, 1000  # passages for /ask, for /retrieve
MOST_QUERIES = 10_000  # of a request to /retrieve
MOST_WAITING = 1000  # requests
AT_ONCE = 1 << 16  # bytes of an answer
CLIENT_SECONDS = 60.0  # that a client may send or take nothing
STOPPING_SECONDS = 10.0  # until those that are being answered are left alone
EXAMPLES = 5
COUNTS = (1, 5, 10, 20, 40)  # of passages, to choose from on the page


class Refused(Exception):  # noqa: N818 (a client's mistake)
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def serve(model: AnsweringModel, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; whoever is being answered then still gets the answer.

    Raises:
        OSError: nothing can listen there.
    """
    try:
        server = Server(model, host, port)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror or error}); give another --port, "
            "or 0 for any that is free"
        ) from error
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    print(server.address, flush=True)
    log.info("%s; Ctrl-C stops", model)
    with server.running():
        stopping.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        log.info("Stopping")


class Server(ThreadingHTTPServer):
    """Answers with one model; everybody waits in one queue.

    Args:
        host, port: where to listen; port 0 is any that is free.
    """

    daemon_threads = True  # those that wait for a client's next request
    request_queue_size = 1024  # clients that connect at the same time

    def __init__(self, model: AnsweringModel, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.model = model
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.waiting = Waiting(self._work, model.batch_size, MOST_WAITING)
        self.examples = model.examples(EXAMPLES)
        page = files("atlas.asking").joinpath("page.html").read_text(encoding="utf-8")
        self._page = fill(page, {"nonce": "{{nonce}}"})  # which is another one for every request
        self._answering, self._changed = 0, threading.Condition()

    def server_bind(self) -> None:
        """Without the look-up of the machine's full name, for which it may wait."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def address(self) -> str:
        """For people: where the page is."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve inside the block; afterwards finish what is being answered."""
        thread = threading.Thread(target=partial(self.serve_forever, poll_interval=0.1), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.waiting.close()
            with self._changed:
                self._changed.wait_for(lambda: not self._answering, STOPPING_SECONDS)
            self.server_close()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around everything that is done for one request."""
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def page(self, nonce: str) -> bytes:
        """The page; its script and its style may run, and no others."""
        return self._page.replace("{{nonce}}", nonce).encode()

    def about(self) -> dict[str, Any]:
        """What the page needs to know."""
        model, most = self.model, min(MOST_READ, self.model.passages)
        counts = sorted({min(k, most) for k in (*COUNTS, model.k)} if most else [])
        return {
            "name": model.name,
            "passages": model.passages,
            "k": min(model.k, most),
            "counts": counts,
            "examples": self.examples,
        }

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """`{"question": "…", "k": 20}` -> `Answer.to_dict`. Raises: Refused."""
        _check_fields(body, ("question", "k"))
        if self.model.config.model.retrieve_only:
            raise Refused(HTTPStatus.NOT_FOUND, "this model has no reader: it can only be asked to /retrieve")
        k = self._count(body, "k", MOST_READ)
        (answer,) = self._wait("ask", k, [self._question(body.get("question"), "question")])
        return answer.to_dict()

    def retrieve(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """`{"queries": ["…"], "topk": 3, "return_scores": true}` -> `{"result": [[{"document", "score"}, …], …]}`.

        Without scores, `result` has the documents themselves. Raises: Refused.
        """
        _check_fields(body, ("queries", "topk", "return_scores"))
        if self.model.retrieval is None:
            raise Refused(HTTPStatus.NOT_FOUND, "this model answers without a search, so it has nothing to retrieve")
        queries, scored = body.get("queries"), body.get("return_scores", False)
        if not isinstance(queries, list) or len(queries) > MOST_QUERIES:
            raise _bad(f"`queries` must be a list of texts, at most {MOST_QUERIES:,}")
        if not isinstance(scored, bool):
            raise _bad("`return_scores` must be true or false")
        k = self._count(body, "topk", MOST_FOUND)
        questions = [self._question(query, f"queries[{i}]") for i, query in enumerate(queries)]
        found = self._wait("retrieve", k, questions) if questions else []
        results = [[(_document(passage.fields), passage.score) for passage in of_query] for of_query in found]
        if not scored:
            return {"result": [[document for document, _ in of_query] for of_query in results]}
        return {"result": [[{"document": doc, "score": score} for doc, score in of_query] for of_query in results]}

    def _work(self, kind: tuple[str, int], questions: list[str]) -> list[Any]:
        what, k = kind
        return self.model.ask(questions, k) if what == "ask" else self.model.search(questions, k)

    def _wait(self, what: str, k: int, questions: list[str]) -> list[Any]:
        try:
            return self.waiting.submit((what, k), questions).result()
        except Full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_WAITING} requests wait already: try later") from None
        except Closed:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping") from None
        except Exception as error:
            log.exception("A request failed")
            sentence = sentence_of(error) if is_understood(error) else f"{type(error).__name__}: {error}"
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, sentence) from error

    def _question(self, question: Any, field: str) -> str:
        if not isinstance(question, str):
            raise _bad(f"`{field}` must be a text")
        try:
            self.model.check(question)
        except ValueError as error:
            raise _bad(str(error)) from error
        return question

    def _count(self, body: Mapping[str, Any], field: str, most: int) -> int:
        k = body.get(field)
        if k is None:
            return min(self.model.k, most)
        if type(k) is not int or not 1 <= k <= most:
            raise _bad(f"`{field}` must be a number of passages from 1 to {most}")
        return k


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "atlas", ""
    timeout = CLIENT_SECONDS

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        nonce = secrets.token_urlsafe()
        self._respond({"/": partial(self.server.page, nonce), "/about": self.server.about}, nonce)

    def do_POST(self) -> None:  # noqa: N802
        calls = {"/ask": self.server.ask, "/retrieve": self.server.retrieve}
        self._respond({path: lambda call=call: call(self._body()) for path, call in calls.items()})

    def _respond(self, answers: Mapping[str, Callable[[], Any]], nonce: str = "") -> None:
        """Send what the path's function gives, or why there is nothing."""
        self._kept = not self.close_connection
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what is not read of a request would be taken for the next one
        with self.server.answering():
            try:
                self._check_host()
                path = self._path()
                if path not in answers:
                    known = {"/": "GET", "/about": "GET", "/ask": "POST", "/retrieve": "POST"}
                    if path in known:
                        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {known[path]}")
                    raise Refused(HTTPStatus.NOT_FOUND, f"there is only {', '.join(known)}")
                status, answer = HTTPStatus.OK, answers[path]()
            except Refused as refused:
                status, answer = refused.status, {"error": str(refused)}
            self._send(status, answer, nonce)

    def _path(self) -> str:
        """Raises: Refused."""
        try:
            return urlsplit(self.path).path
        except ValueError:
            raise _bad("the address of the request cannot be read") from None

    def _check_host(self) -> None:
        """Refuse what was sent to another name: a site may have told its script that this machine has it."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            name = ""
        if name.lower() in self.server.names:
            return
        try:
            ipaddress.ip_address(name)  # nobody else can make a browser send a number
        except ValueError:
            self.close_connection = True
            raise Refused(
                HTTPStatus.FORBIDDEN,
                "the `Host` of a request must be localhost, an address, or the name given by --host",
            ) from None

    def _body(self) -> dict[str, Any]:
        """The object that a request brings. Raises: Refused."""
        self.close_connection = True  # unless all of it is read
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or not length.isascii() or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request needs a Content-Length")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MOST_BYTES >> 20} MiB")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise _bad("the request ended before its Content-Length")
        self.close_connection = not self._kept
        try:
            body = json.loads(content.decode("utf-8"))
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
        except (ValueError, RecursionError):
            raise _bad("the request is not JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise _bad("the request must be an object of JSON")
        return body

    def _send(self, status: HTTPStatus, answer: Any, nonce: str = "") -> None:
        is_page = isinstance(answer, bytes)
        content = answer if is_page else json.dumps(answer, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{'text/html' if is_page else 'application/json'}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        policy = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        if is_page:
            own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
            policy = f"{policy}; {own}; connect-src 'self'; img-src data:"
        self.send_header("Content-Security-Policy", policy)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(content), AT_ONCE):  # a client has the time that it may take for each of them
                self.wfile.write(content[start : start + AT_ONCE])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form."""
        status = HTTPStatus(code)
        self.close_connection = True
        self._send(status, {"error": (message or status.phrase).lower()})

    def handle(self) -> None:
        """Requests until the client leaves, which it may do at any time."""
        try:
            super().handle()
        except OSError as error:
            log.debug("A client has gone: %s", error)

    def log_message(self, format: str, *values: object) -> None:
        log.debug(format, *values)


def _check_fields(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := body.keys() - set(known):
        raise _bad(f"there is no field `{min(unknown):.40}`: a request has {', '.join(known)}")


def _bad(sentence: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, sentence)


def _document(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A passage as Search-R1's corpora have it: `contents` is the title in quotes, a line end, the text."""
    contents = f'"{fields.get("title") or ""}"\n{fields.get("text") or ""}'
    return dict(fields) | {"id": fields.get("id"), "contents": contents}
