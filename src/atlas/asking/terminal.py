"""The prompt of ask.py."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator

from atlas.asking.answers import Answer, printable
from atlas.asking.model import AnsweringModel
from atlas.files.cache import users_state
from atlas.runtime.session import is_understood, sentence_of

HELP = """Type a question, or
  /passages   the passages of the last answer
  /k N        find and read N passages from now on
  /help       these lines
Ctrl-C cancels, Ctrl-D ends."""
LONGEST_HISTORY = 1000


def prompt(model: AnsweringModel, as_json: bool = False) -> None:
    """Answer questions until the end of standard input."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines, at_terminal = _Lines(model, as_json), sys.stdin.isatty()
    if at_terminal:
        lines.say(f"{model}\n/help says what can be typed.")
    with history("questions"):
        while True:
            try:
                lines.follow(input("> " if at_terminal else "").strip())
            except EOFError:
                break
            except KeyboardInterrupt:
                lines.say("")
            except (ValueError, RuntimeError, MemoryError) as error:
                if not is_understood(error):
                    raise
                lines.say(sentence_of(error))
    if at_terminal:
        lines.say("")


class _Lines:
    """Does what is typed: a question, or a word that begins with a slash."""

    def __init__(self, model: AnsweringModel, as_json: bool) -> None:
        self.model, self.as_json = model, as_json
        self.k = model.k
        self.last: Answer | None = None

    def say(self, text: str) -> None:
        """For people: with --json, standard output is for answers alone."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def follow(self, line: str) -> None:
        """Raises: ValueError, as `AnsweringModel.ask`."""
        word, _, rest = line.partition(" ")
        if word == "/passages":
            self.say("\n".join(self.last.passage_lines()) or "no passages" if self.last else "nothing was asked yet")
        elif word == "/k" and rest.strip().isdecimal() and int(rest):
            self.k = int(rest)
        elif word == "/k":
            self.say(f"/k is followed by a number of passages, at least 1; it is {self.k}")
        elif word == "/help":
            self.say(HELP)
        elif word.startswith("/"):
            self.say(f"there is no {word}; /help says what there is")
        elif word:
            self._ask(line)

    def _ask(self, question: str) -> None:
        """Print the answer while it is written."""
        stream = self.model.ask(question, self.k, stream=True)
        try:
            for piece in stream:
                if not self.as_json:
                    print(printable(piece), end="", flush=True)
        finally:
            stream.cancel()  # of no effect on one that is whole
        self.last = stream.answer
        if self.as_json:
            print(json.dumps(self.last.to_dict(), ensure_ascii=False), flush=True)
        else:
            print(f"   ({self.last.score:.2f})", flush=True)


@contextlib.contextmanager
def history(name: str) -> Iterator[None]:
    """At a terminal, have what was typed in earlier sessions at hand, and keep what is typed in this one."""
    try:
        import readline
    except ImportError:  # Python was built without it
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    try:
        file = users_state(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except (OSError, RuntimeError) as error:  # no place for it, or no home
        print(f"What is typed is not kept: {error}", file=sys.stderr)
        yield
        return
    readline.set_history_length(LONGEST_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk; the session was fine
            readline.write_history_file(file)
