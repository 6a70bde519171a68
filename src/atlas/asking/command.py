"""The command `ask.py RUN`: a prompt in the terminal, one question, or with --serve a page and endpoints over HTTP."""

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from atlas.asking.settings import config_for, find_saved
from atlas.command_line import flags_parser
from atlas.config import OF_THE_MODEL, sentence

HOST, PORT = "127.0.0.1", 8000
INSTEAD = {
    "What it runs on": ("device", "precision", "int8_reader", "embedder_precision", "verify"),
    "What it searches": (
        *("passages", "max_passages", "save_index_path", "allow_other_index", "faiss_nprobe", "refine_factor"),
        *("retrieve_with_rerank", "n_to_rerank_with_retrieve_with_rerank"),
    ),
    "What the run was trained with, and others to use instead": (
        *("task", "gold_score_mode", "gold_question_weight", "temperature_gold", "closed_book"),
        *(name for name in OF_THE_MODEL if name != "n_context"),
    ),
}
DESCRIPTION = "Ask a trained model. Without a QUESTION it prompts for questions; /help says what else can be typed."


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, load the model, and ask it. A mistake ends the program with one sentence.

    Raises:
        SystemExit: with status 2 for a wrong flag, before anything is loaded, else 1.
    """
    options, flags = parse(arguments)
    # `--help` and a wrong flag are answered before torch is imported.
    from atlas.asking.loading import load
    from atlas.runtime.session import is_understood, sentence_of
    from atlas.runtime.tracking import discard, open_standard_streams

    open_standard_streams()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no text spoils its question alone
        sys.stdin.reconfigure(errors="surrogateescape")
    log = logging.getLogger("atlas")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stderr)]  # standard output is for answers
    try:
        work(options, load(options.run, options.index, **flags))
    except BrokenPipeError:  # nobody reads the answers any more
        discard(sys.stdout)
    except Exception as error:
        if not is_understood(error):
            raise
        sys.exit(sentence_of(error))


def work(options: argparse.Namespace, model: Any) -> None:
    """Serve, answer the question, or prompt for some."""
    if options.serve:
        from atlas.asking.server import serve

        serve(model, options.host, options.port)
    elif options.question is not None:
        answer = model.ask(options.question)
        print(json.dumps(answer.to_dict(), ensure_ascii=False) if options.json else answer)
    else:
        from atlas.asking.terminal import prompt

        prompt(model, as_json=options.json)


def make_parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    parser = flags_parser("ask.py", "%(prog)s RUN [QUESTION] [flags]", DESCRIPTION, INSTEAD)
    own = parser.add_argument_group("Asking")
    own.add_argument("run", metavar="RUN", help="a run, a checkpoint, or a directory of exported models")
    own.add_argument("question", metavar="QUESTION", nargs="?", default=None, help="answer this one, and end")
    own.add_argument("--index", metavar="DIR", default=None, help="the saved index to search (default: the run's)")
    own.add_argument("--k", type=_from(1), default=None, help="passages to find and to read (default: as in the run)")
    own.add_argument("--json", action="store_true", default=False, help="print answers as JSON, one a line")
    own.add_argument(
        "--serve", action="store_true", default=False, help="a page for browsers, and POST /ask, /retrieve"
    )
    own.add_argument("--host", default=None, help=f"address to serve at (default: {HOST}, this machine alone)")
    own.add_argument("--port", type=_from(0), default=None, help=f"port to serve at; 0: any (default: {PORT})")
    return parser


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line: its own options, and the flags that replace those of the run.

    Raises:
        SystemExit: with status 2 and one sentence.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    names = ("run", "question", "index", "k", "json", "serve", "host", "port")
    flags = {name: value for name, value in vars(options).items() if name not in names}
    if options.k is not None:
        flags["n_context"] = options.k
    for name, given, without in (
        ("--host", options.host is not None and not options.serve, "without --serve"),
        ("--port", options.port is not None and not options.serve, "without --serve"),
        ("--json", options.json and options.serve, "with --serve, which always answers programs with JSON"),
        ("QUESTION", options.question is not None and options.serve, "with --serve"),
        ("--index", options.index is not None and "passages" in flags, "with --passages: give one of both"),
    ):
        if given:
            parser.error(f"{name} has no effect {without}")
    options.host, options.port = options.host or HOST, PORT if options.port is None else options.port
    if options.port > 65535:
        parser.error(f"--port {options.port} is too large: it must be at most 65535")
    try:
        saved = find_saved(options.run)
        if saved.kind != "published":  # only torch can read what such a checkpoint says
            config = config_for(saved, options.index, flags)
            if options.k is not None and config.model.closed_book:
                parser.error("--k has no effect on a run that is closed-book: give an --index as well, or leave it out")
    except (ValueError, OSError) as error:
        parser.error(sentence(error))
    return options, flags


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {least}")
        return value

    number.__name__ = "number"  # as argparse calls it where int fails
    return number
