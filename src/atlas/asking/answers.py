"""What a model returns when it is asked: an answer with its passages, for programs, terminals and notebooks."""

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.report.packing import finite

WIDTH, SHOWN, PRINTED = 100, 300, 5  # of a terminal; characters of a passage, and passages beside an answer
WRITTEN = "\n\u200c\u200d\u00ad"  # not printable, and part of texts: joiners of Persian and Hindi, soft hyphens
SHORTEST_WORD = 3  # of an answer that is marked by itself
STYLE = """
.atlas-answer{font:14px/1.5 system-ui,sans-serif;max-width:56em}
.atlas-answer table{border-collapse:collapse;width:100%}
.atlas-answer td,.atlas-answer th{text-align:left;vertical-align:top;padding:.3em .6em;border-top:1px solid #8885}
.atlas-answer mark{background:#ffd54a66;color:inherit;border-radius:.2em}
.atlas-answer .number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
"""


@dataclass(frozen=True)
class Passage:
    """A passage that was found, and how useful it was."""

    fields: Mapping[str, Any]  # as in the corpus; a title is joined with its section
    score: float | None  # the retriever's; None where the passage came with the question
    judgement: float | None = None  # the reader's, a probability over the passages: `signals.judgements`
    attention: float | None = None  # the decoder's to this passage while it wrote the answer; over all, they sum to 1

    @property
    def id(self) -> str | None:
        return self.fields.get("id")

    @property
    def title(self) -> str:
        return self.fields.get("title") or ""

    @property
    def text(self) -> str:
        return self.fields.get("text") or ""

    def to_dict(self) -> dict[str, Any]:
        """The passage's fields, with `score`, `judgement` and `attention`."""
        values = {"score": self.score, "judgement": self.judgement, "attention": self.attention}
        return dict(self.fields) | {name: finite(value) for name, value in values.items()}


@dataclass(frozen=True)
class Answer:
    """The answer to a question."""

    question: str  # as it was asked
    query: str  # as the model was given it
    text: str
    score: float | None  # the reader's probability of a token of its answer, as a geometric mean: 0 to 1
    passages: Sequence[Passage]  # best first, by the retriever
    seconds: Mapping[str, float]  # of each stage (embed, search, read, judge), for the whole batch

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; each passage also has `marks`, which is what `marks` finds."""
        return {
            "question": self.question,
            "answer": self.text,
            "score": finite(self.score),
            "passages": [passage.to_dict() | {"marks": marks(passage.text, self.text)} for passage in self.passages],
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        certain = "" if self.score is None else f"   ({self.score:.2f})"
        more = len(self.passages) - PRINTED
        rest = [f"     … and {more} more passage{'s' * (more > 1)}"] if more > 0 else []
        return "\n".join([f"{printable(self.text)}{certain}", *self.passage_lines(PRINTED), *rest])

    def passage_lines(self, most: int | None = None) -> list[str]:
        """The first passages as lines for a terminal."""
        lines = []
        for number, passage in enumerate(self.passages[:most], 1):
            values = (("score", passage.score, "{:.2f}"), ("judgement", passage.judgement, "{:.0%}"))
            values = (*values, ("attention", passage.attention, "{:.0%}"))
            said = ", ".join(f"{name} {form.format(value)}" for name, value, form in values if value is not None)
            identifier = "" if passage.id is None else f" [{passage.id}]"
            title = " ".join((passage.title or "(no title)").split())
            lines.append(f"{number:3}  {printable(title + identifier)}  {said}")
            text = printable(textwrap.shorten(passage.text, SHOWN, placeholder=" …"))
            lines += textwrap.wrap(text, WIDTH, initial_indent="     ", subsequent_indent="     ")
        return lines

    def _repr_html_(self) -> str:
        """For notebooks. Nothing of question, answer and passages is taken for HTML."""
        rows = []
        for number, passage in enumerate(self.passages, 1):
            values = (("{:.2f}", passage.score), ("{:.0%}", passage.judgement), ("{:.0%}", passage.attention))
            cells = "".join(
                f"<td class=number>{'' if value is None else form.format(value)}</td>" for form, value in values
            )
            source = html.escape(f"{passage.title} [{passage.id}]" if passage.id is not None else passage.title)
            rows.append(
                f"<tr><td class=number>{number}</td><td><b>{source}</b><br>{_marked(passage.text, self.text)}</td>"
                f"{cells}</tr>"
            )
        head = "<tr><th></th><th>passage</th><th>score</th><th>judgement</th><th>attention</th></tr>"
        table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
        certain = "" if self.score is None else f" ({self.score:.2f})"
        return (
            f"<style>{STYLE}</style><div class=atlas-answer><p>{html.escape(self.question)}</p>"
            f"<p><b>{html.escape(self.text)}</b>{certain}</p>{table}</div>"
        )


def printable(text: str) -> str:
    """A text on a terminal, which it cannot command: no escape sequence of a corpus gets there."""
    text = re.sub(r"[^\S\n]", " ", text)  # spaces of all kinds
    return "".join(one if one.isprintable() or one in WRITTEN else "\N{REPLACEMENT CHARACTER}" for one in text)


def marks(text: str, answer: str) -> list[list[int]]:
    """Where an answer is in a text, or else its words: `[[start, end], ...]`, in characters, in order."""
    words = re.findall(r"\w+", answer)
    if not words:
        return []
    whole = _places(text, r"\W+".join(map(re.escape, words)))
    long = [re.escape(word) for word in words if len(word) >= SHORTEST_WORD or word.isdigit()]
    return whole or (_places(text, "|".join(long)) if long else [])


def _places(text: str, pattern: str) -> list[list[int]]:
    return [list(found.span()) for found in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]


def _marked(text: str, answer: str) -> str:
    """The text as HTML, with what `marks` finds in `<mark>`."""
    parts, at = [], 0
    for start, end in marks(text, answer):
        parts += [html.escape(text[at:start]), f"<mark>{html.escape(text[start:end])}</mark>"]
        at = end
    return "".join([*parts, html.escape(text[at:])])
