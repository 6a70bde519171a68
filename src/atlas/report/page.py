"""The page: what was run, curves, results, mistakes, and every question, in one file that needs nothing else.

Everything but the questions is HTML when it arrives. The questions are packed, and the page's script unpacks those that
are looked at. Where they are too large, they are in a second file beside the page.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from atlas.files.jsonl import replacing
from atlas.report.packing import Packed
from atlas.report.questions import KINDS, Questions, Reader
from atlas.report.record import Evaluation, Record, read_record
from atlas.report.sections import body

NAME = "report.html"
MARK = "<!-- a report by atlas.report: it is written again -->"
MOST_BYTES = 30_000_000  # of the page


def write_report(directory: Path, other: Path | None = None, output: Path | None = None) -> list[Path]:
    """Write the report of a run, beside another run if there is one.

    Args:
        output: the page; by default `report.html` in the directory, or `report-beside-{other}.html`.

    Returns:
        The page, and the file of what does not fit into it, if there is one: `{page}.questions.js`.

    Raises:
        ValueError: there is no run, one of its files cannot be read, or there is something else in the page's place.
        OSError: a file cannot be read or written.
    """
    record, beside = read_record(directory), read_record(other) if other else None
    page = output or directory / (NAME if beside is None else f"report-beside-{beside.name}.html")
    second = page.with_name(f"{page.stem}.questions.js")
    for path in (page, second):
        _check_ours(path)
    reader, pairs = Reader(), list(_pairs(record, beside))
    questions = []
    for last, run, earlier in pairs:
        before = reader.before(run, earlier, passages=beside is not None) if earlier else {}
        questions.append(reader.questions(record, last, before))
    reader.passages.packed.finish()
    packed = _packed(reader, questions)
    head = _head(record, beside, questions, pairs, packed, second.name)
    start, end = _form(record, beside, head, body(record, beside, questions, page.parent))
    room = MOST_BYTES - len((start + end).encode())
    inside, outside = _divide(packed, room)
    if outside:
        _write(second, [f"// {MARK}\n"], outside, f'packed("{head["key"]}", "{{}}", "', '");\n', [])
    elif second.exists():
        second.unlink()  # of a report that was larger
    _write(page, [start], inside, '<script type="text/plain" id="{}">', "</script>\n", [end])
    return [page, second] if outside else [page]


def fill(page: str, values: Mapping[str, str]) -> str:
    """The page with a value in the place of each `{{name}}`; `look.css` and `look.js` are shared by all pages."""
    found = {name: resource(name) for name in ("look.css", "look.js")} | dict(values)
    return re.sub(r"\{\{([\w.]+)\}\}", lambda place: found[place[1]], page)


def resource(name: str) -> str:
    """A text file of this folder."""
    return files("atlas.report").joinpath(name).read_text(encoding="utf-8")


def _pairs(record: Record, beside: Record | None) -> Iterator[tuple[Evaluation, Record, Evaluation | None]]:
    """The last evaluation of each file with results, and what to compare it with: the first one, or the other run's."""
    for file in record.files:
        own = [evaluation for evaluation in record.of_file(file) if evaluation.results]
        if not own:
            continue
        if beside:
            of_other = [evaluation for evaluation in beside.of_file(file) if evaluation.results]
            yield own[-1], beside, of_other[-1] if of_other else None
        else:
            yield own[-1], record, own[0] if len(own) > 1 else None


def _packed(reader: Reader, questions: Sequence[Questions]) -> dict[str, Packed]:
    """Everything that is packed, by the name that it has on the page; what is needed first comes first."""
    packed = {f"listed-{i}": one.listed for i, one in enumerate(questions)}
    packed |= {f"details-{i}": one.details for i, one in enumerate(questions)}
    return packed | {"passages": reader.passages.packed}


def _head(
    record: Record,
    beside: Record | None,
    questions: Sequence[Questions],
    pairs: Sequence[tuple[Evaluation, Record, Evaluation | None]],
    packed: Mapping[str, Packed],
    second: str,
) -> dict[str, Any]:
    """What the page's script has to know before it unpacks anything."""
    of_files = [
        {
            "file": one.file,
            "step": one.step,
            "read": one.read,
            "n": len(one.listed),
            "before": earlier and (beside.name if beside else f"step {earlier.step}"),
        }
        for one, (_, _, earlier) in zip(questions, pairs, strict=True)
    ]
    starts = {name: pieces.starts for name, pieces in packed.items()}
    key = hashlib.sha256()  # of what belongs together in two files
    for pieces in packed.values():
        key.update("".join(pieces.pieces).encode())
    names = {
        "name": record.name,
        "beside": beside.name if beside else None,
        "second": second,
        "key": key.hexdigest()[:32],
    }
    return names | {"files": of_files, "starts": starts, "kinds": [name for name, _ in KINDS.values()]}


def _form(record: Record, beside: Record | None, head: Mapping[str, Any], above: str) -> list[str]:
    """The page up to where the packed values go, and what comes after them."""
    script = fill(resource("report.js"), {})
    style = fill(resource("report.css"), {})
    task = f"--task {record.flags['task'].value}" if "task" in record.flags else ""
    title = f"{record.name} and {beside.name}" if beside else record.name
    values = {
        "mark": MARK,
        "title": escape(title),
        "about": escape(task),
        "style": style,
        "script": script,
        # Nothing runs but this script and the file beside the page, whatever a text may say.
        "scripts": f"'{_hash(script)}' 'self' file:",
        "styles": f"'{_hash(style)}'",
        "body": above,
        "head": json.dumps(head).replace("<", "\\u003c"),
        "hidden": "" if head["files"] else " hidden",
    }
    return [fill(part, values) for part in resource("report.html").split("{{packed}}")]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _divide(packed: Mapping[str, Packed], room: int) -> tuple[dict[str, Packed], dict[str, Packed]]:
    """What fits into so many bytes, in order, and the rest."""
    inside, outside = {}, {}
    for name, pieces in packed.items():
        place = outside if outside or pieces.size > room else inside
        place[name] = pieces
        room -= pieces.size + 100  # and what stands around it
    return inside, outside


def _write(
    path: Path, start: Sequence[str], packed: Mapping[str, Packed], before: str, after: str, end: Sequence[str]
) -> None:
    """Write a file piece by piece; it is there as a whole or not at all."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(start)
        for name, pieces in packed.items():
            file.write(before.format(name))
            file.writelines(f"{piece} " for piece in pieces.pieces)
            file.write(after)
        file.writelines(end)


def _check_ours(path: Path) -> None:
    """Raises: ValueError if there is something that is not a report, which would be overwritten."""
    if not path.exists():
        return
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(1000)
    if MARK.encode() not in start:
        raise ValueError(f"{path} is there and is no report: move it, or give another --output")
