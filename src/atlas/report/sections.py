"""The parts of the page that stand there without a script. A part that has nothing to say is left out."""

import re
import shlex
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from atlas.metrics import NO_PERCENTAGES, spoken
from atlas.report.charts import COLOURS, Curve, chart, number
from atlas.report.questions import KINDS, RIGHT, Questions, mcnemar
from atlas.report.record import Evaluation, Event, Record

ANSWERS, RECALL, JUDGED = "Answers", "Recall", "Judged"  # what a metric is of; what is no percentage stands alone
TRAINING = {  # title -> the names, or how they begin
    "Loss": ("loss/",),
    "Learning rate": ("lr",),
    "Seconds of a step": ("runtime/",),
    "Correlation with the attention": ("corr/",),
    "Tokens per second": ("tokens_per_second",),
    "Passages per second": ("passages_per_second",),
    "Share of the device's peak": ("share_of_peak",),
    "Skipped steps": ("skipped_steps",),
}
PLACES = ("name", "checkpoint_dir")  # flags in which any two runs differ
MOST_TILES = 5


def body(record: Record, beside: Record | None, questions: Sequence[Questions], place: Path) -> str:
    """Everything above the questions, as HTML, for a page in this directory."""
    records = [record, beside] if beside else [record]
    parts = [
        _tiles(record, beside),
        _comparison(record, beside, questions) if beside else "",
        *(_what_was_run(one, titled=beside is not None) for one in records),
        _differences(record, beside) if beside else "",
        _section("Over the steps", _figures(_training_charts(records) + _evaluation_charts(records))),
        _section("Evaluations", _results(records, place)),
        _section("Retrieval", _figures(_recall(record, beside, one) for one in questions)),
        *(_mistakes(one, len(questions) > 1) for one in questions),
    ]
    content = "\n".join(part for part in parts if part)
    links = re.findall(r'<section id="([^"]+)"><h2>([^<]+)', content)
    if questions:
        links.append(("questions", "Questions"))
    linked = " ".join(f'<a href="#{place}">{title}</a>' for place, title in links)
    return f"<nav>{linked}</nav>\n{content}"


def metric_name(name: str) -> str:
    """As a reader calls it: `exact_match` is the exact match."""
    return "learning rate" if name == "lr" else spoken(name)


def metric_value(name: str, value: float) -> str:
    """Percentages with one digit behind the point, other values with four digits."""
    return number(value) if name in NO_PERCENTAGES else f"{value:.1f}"


def _metrics_of(what: str, evaluations: Iterable[Evaluation]) -> list[str]:
    """The metrics of answers (also those of a task of one's own), of recall or of judgements, in their order."""
    beginnings = {"recall@": RECALL, "judged_": JUDGED}
    names = dict.fromkeys(name for one in evaluations for name in one.metrics if name not in NO_PERCENTAGES)
    return [name for name in names if beginnings.get(name[:7], ANSWERS) == what]


def _section(title: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    said = f"<span>{escape(note)}</span>" if note else ""
    place = escape(re.sub(r"\W+", "-", title.lower()))
    return f'<section id="{place}"><h2>{escape(title)}{said}</h2>{content}</section>'


def _figures(figures: Iterable[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _tiles(record: Record, beside: Record | None) -> str:
    """The last results in large figures, with the change since the first evaluation, or against the other run."""
    rows = []
    for file in record.files:
        evaluations = record.of_file(file)
        last, against, said = evaluations[-1], None, ""
        if beside and beside.of_file(file):
            against, said = beside.of_file(file)[-1], f"against {beside.name}"
        elif not beside and len(evaluations) > 1:
            against, said = evaluations[0], f"since step {evaluations[0].step}"
        recalls = _metrics_of(RECALL, [last]) or _metrics_of(JUDGED, [last])
        names = [
            *_metrics_of(ANSWERS, [last]),
            *recalls[:1],
            *recalls[-1:],
            *(n for n in NO_PERCENTAGES if n in last.metrics),
        ]
        tiles = [_tile(name, last, against, said) for name in list(dict.fromkeys(names))[:MOST_TILES]]
        counted = f", {last.examples:,} examples" if last.examples else ""
        if tiles:
            rows.append(f'<p class="quiet">{escape(file)}, step {last.step}{counted}</p>')
            rows.append(f'<div class="tiles">{"".join(tiles)}</div>')
    return f"<section>{''.join(rows)}</section>" if rows else ""


def _tile(name: str, last: Evaluation, against: Evaluation | None, said: str) -> str:
    value, change = last.metrics[name], ""
    if against and name in against.metrics:
        difference = value - against.metrics[name]
        moved = metric_value(name, abs(difference))
        sign = "+" if difference > 0 else "−"
        change = f"<small>{'no change' if abs(difference) < 1e-4 else sign + moved} {escape(said)}</small>"
    return f"<div><span>{escape(metric_name(name))}</span><b>{metric_value(name, value)}</b>{change}</div>"


def _what_was_run(record: Record, titled: bool) -> str:
    facts = {name: value for name, value in _facts(record) if value}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{_unbroken(escape(value))}</dd>" for name, value in facts.items())
    changed = {name: flag for name, flag in record.flags.items() if flag.default is not None}
    flags = "".join(
        f"<tr><th>--{escape(name)}</th><td>{escape(flag.value)}</td><td>{escape(flag.default or 'none')}</td></tr>"
        for name, flag in changed.items()
    )
    if flags:
        rows_of_flags = f"<table><tr><th>flag</th><th>value</th><th>default</th></tr>{flags}</table>"
        flags = f"<details><summary>Flags that differ from their defaults: {len(changed)}</summary>"
        flags += f'<div class="wide">{rows_of_flags}</div></details>'
    title = f"What was run: {record.name}" if titled else "What was run"
    return _section(title, f'<dl class="facts">{rows}</dl>{flags}' if rows or flags else "")


def _unbroken(text: str) -> str:
    """Browsers break lines after the hyphens of a flag."""
    return re.sub(r"--\w+", r'<span class="flag">\g<0></span>', text)


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    last = record.main_start
    yield "command", _command(last)
    if record.starts and last is not record.starts[-1]:
        yield "then", _command(record.starts[-1])
    if record.starts:
        first = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.starts[0]["time"]))
        times = len(record.starts)
        yield "started", f"{times} times, first at {first}" if times > 1 else first
    yield "took", _duration(record.seconds) if record.seconds else ""
    ranks = last.get("ranks")
    yield (
        "device",
        f"{ranks} processes, each on {last['device']}" if ranks and ranks > 1 else str(last.get("device") or ""),
    )
    yield "versions", ", ".join(f"{name} {of}" for name, of in (last.get("versions") or {}).items() if of)
    peaks = [values["peak_memory_gib"] for values in record.training.values() if "peak_memory_gib" in values]
    yield "peak memory", f"{max(peaks):.2f} GiB of a process" if peaks else ""
    if record.refreshes:
        seconds = sum(event.get("seconds") or 0 for event in record.refreshes)
        times = f"built {len(record.refreshes)} times" if len(record.refreshes) > 1 else "built"
        yield "index", f"{times} in {_duration(seconds)}"
    gone = [evaluation.gone for evaluation in record.evaluations if evaluation.gone]
    yield "no longer there", ", ".join(gone)


def _command(start: Event) -> str:
    """What was typed; the empty text where that is not known."""
    command = start.get("command")
    return "python " + shlex.join(command) if isinstance(command, list) and len(command) > 1 else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _differences(record: Record, beside: Record) -> str:
    names = [name for name in {**record.flags, **beside.flags} if name not in PLACES]
    pairs = {name: [run.flags[name].value if name in run.flags else "" for run in (record, beside)] for name in names}
    rows = "".join(
        f"<tr><th>--{escape(name)}</th><td>{escape(here)}</td><td>{escape(there)}</td></tr>"
        for name, (here, there) in pairs.items()
        if here != there
    )
    head = f"<tr><th></th><th>{escape(record.name)}</th><th>{escape(beside.name)}</th></tr>"
    return _section("Flags that differ", f'<div class="wide"><table>{head}{rows}</table></div>' if rows else "")


def _comparison(record: Record, beside: Record, questions: Sequence[Questions]) -> str:
    """Wins and losses of each file that both have, with McNemar's test."""
    rows = []
    for one in questions:
        if not one.changes:
            continue
        wins, losses = one.changes[False, True], one.changes[True, False]
        both, neither = one.changes[True, True], one.changes[False, False]
        alone = len(one.listed) - one.changes.total()
        cells = [len(one.listed) - alone, wins, losses, both, neither]
        said = f"<tr><th>{escape(one.file)}</th>{''.join(f'<td>{cell:,}</td>' for cell in cells)}"
        rows.append(f"{said}<td>{mcnemar(wins, losses):.3g}</td><td>{alone or ''}</td></tr>")
    here, there = escape(record.name), escape(beside.name)
    heads = ["", "questions", f"{here} alone right", f"{there} alone right", "both right", "both wrong"]
    if any(not one.read for one in questions):
        heads = [head.replace("right", "right or found") for head in heads]
    heads += ["McNemar's p", f"not in {there}"]
    head = "".join(f"<th>{name}</th>" for name in heads)
    table = f'<div class="wide"><table class="numbers"><tr>{head}</tr>{"".join(rows)}</table></div>'
    note = "wins, losses, and the exact p of McNemar's test, two-sided"
    missing = [file for file in record.files if file not in {one.file for one in questions if one.changes}]
    said = f'<p class="quiet">Without questions to compare: {escape(", ".join(missing))}</p>' if missing else ""
    return _section(f"{record.name} and {beside.name}", (table if rows else "") + said, note if rows else "")


def _training_charts(records: Sequence[Record]) -> list[str]:
    figures = []
    for title, beginnings in TRAINING.items():
        curves = []
        for dashed, record in enumerate(records):
            # What stays 0 says nothing: passages of a closed book, steps that were not skipped.
            names = dict.fromkeys(
                name for values in record.training.values() for name, value in values.items() if value
            )
            chosen = [name for name in names if name.startswith(beginnings)]
            for colour, name in enumerate(sorted(chosen, key=lambda name: name != "loss/train_loss")):
                points = [(step, values[name]) for step, values in record.training.items() if name in values]
                label = metric_name(name.partition("/")[2].removesuffix("_loss") or name)
                curves.append(_of_run(label, points, records, dashed, colour))
        figures.append(chart(title, curves))
    return figures


def _of_run(
    label: str, points: Sequence[tuple[float, float]], records: Sequence[Record], run: int, colour: int
) -> Curve:
    named = f"{label}, {records[run].name}" if len(records) > 1 else label
    return Curve(named, points, dashed=run > 0, colour=colour % COLOURS)


def _evaluation_charts(records: Sequence[Record]) -> list[str]:
    """A figure of each file for its metrics, and one of all files for what all have alike."""
    files = list(dict.fromkeys(file for record in records for file in record.files))
    figures, losses, times = [], [], []
    for of_file, file in enumerate(files):
        ending = f", {file}" if len(files) > 1 else ""
        for title in (ANSWERS, RECALL, JUDGED):
            curves = []
            for run, record in enumerate(records):
                evaluations = record.of_file(file)
                for colour, name in enumerate(_metrics_of(title, evaluations)):
                    points = [(one.step, one.metrics[name]) for one in evaluations if name in one.metrics]
                    curves.append(_of_run(metric_name(name), points, records, run, colour))
            figures.append(chart(title + ending, curves))
        for run, record in enumerate(records):
            evaluations = record.of_file(file)
            points = [(one.step, one.metrics["eval_loss"]) for one in evaluations if "eval_loss" in one.metrics]
            losses.append(_of_run(file, points, records, run, of_file))
            points = [(one.step, one.seconds) for one in evaluations if one.seconds is not None]
            times.append(_of_run(file, points, records, run, of_file))
    return [*figures, chart("Loss of the evaluation", losses), chart("Seconds of an evaluation", times)]


def _results(records: Sequence[Record], place: Path) -> str:
    """All evaluations as a table, with links to their files."""
    all_of_them = [(record, evaluation) for record in records for evaluation in record.evaluations]
    names = list(dict.fromkeys(name for _, evaluation in all_of_them for name in evaluation.metrics))
    rows = []
    for record, one in all_of_them:
        cells = [metric_value(name, one.metrics[name]) if name in one.metrics else "" for name in names]
        run = f"<th>{escape(record.name)}</th>" if len(records) > 1 else ""
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        examples = "" if one.examples is None else f"{one.examples:,}"
        values = "".join(f"<td>{cell}</td>" for cell in (one.step, examples, seconds, *cells))
        rows.append(f"<tr>{run}<th>{escape(one.file)}</th>{values}<td>{_link(one.results, place)}</td></tr>")
    if not rows:
        return ""
    heads = [
        *(["run"] if len(records) > 1 else []),
        "file",
        "step",
        "examples",
        "seconds",
        *map(metric_name, names),
        "",
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="wide"><table class="numbers"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _link(path: Path | None, place: Path) -> str:
    """To a file beside a page that lies there; the name of another one."""
    if path is None:
        return ""
    name = escape(path.name)
    beside = path.parent.resolve() == place.resolve()
    return f'<a href="./{escape(quote(path.name))}">{name}</a>' if beside else name


def _recall(record: Record, beside: Record | None, one: Questions) -> str:
    """recall@k over k: of every k where the results tell, else of those that were measured."""
    evaluations = record.of_file(one.file)
    own = next(evaluation for evaluation in evaluations if evaluation.step == one.step)
    name = record.name if beside else f"step {own.step}"
    curves = [Curve(name, sorted(one.recall().items()) or _measured(own))]
    against = beside.of_file(one.file)[-1:] if beside else evaluations[:1]
    if against and against[0] is not own:
        curves.append(Curve(beside.name if beside else f"step {against[0].step}", _measured(against[0]), dashed=True))
    return chart(f"recall@k, {one.file}", curves)


def _measured(evaluation: Evaluation) -> list[tuple[float, float]]:
    names = [name for name in evaluation.metrics if name.startswith("recall@")]
    return sorted((int(name.partition("@")[2]), evaluation.metrics[name]) for name in names)


def _mistakes(one: Questions, named: bool) -> str:
    """How many questions are right, and what went wrong with the others; a click shows them."""
    total = one.kinds.total()
    if not total:
        return ""
    rows = []
    for kind, (name, meaning) in KINDS.items():
        n = one.kinds[kind]
        if n or kind == RIGHT:
            style = "right" if kind == RIGHT else "mistake"
            rows.append(
                f'<li><button type="button" data-file="{escape(one.file)}" data-kind="{kind}">{escape(name)}</button>'
                f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="{style}" '
                f'width="{100 * n / total:.2f}" height="10"/></svg><b>{n:,}</b><span class="quiet">'
                f"{100 * n / total:.1f} % · {escape(meaning)}</span></li>"
            )
    title = "What went wrong" + (f", {one.file}" if named else "")
    return _section(title, f'<ul class="kinds">{"".join(rows)}</ul>', f"step {one.step}")
