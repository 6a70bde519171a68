"""What a run wrote about itself: `metrics.jsonl`, and of earlier versions `run.log`; its flags in `opt.log`."""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]  # a line of metrics.jsonl

# The lines of run.log, as versions without metrics.jsonl wrote them.
LINE = re.compile(r"\[(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d)\] (.*)")
START = re.compile(r"((?:One process|\d+ processes .*) on .*), torch (\S+), --precision .*")
RESUME = re.compile(r"Resuming after step (\d+) of .*")
TRAIN = re.compile(r"(\d+) / \d+ \| (.*)")
DATASET = re.compile(r"Dataset: (.*)\.jsonl \| (.*)")
EVALUATED = re.compile(r"Evaluated (\d+) examples in ([\d.]+) s(?:: (.*))?")
FLAG = re.compile(r"(\w+): (.*?)(?:    \[(.*)\])?")


class Flag(NamedTuple):
    """A flag of a run, as `opt.log` has it."""

    value: str
    default: str | None  # where it is another one


@dataclass
class Evaluation:
    """One file, evaluated after a step."""

    file: str  # its name without its ending
    step: int
    metrics: Mapping[str, float]
    seconds: float | None = None
    examples: int | None = None
    results: Path | None = None  # None: no results were written, or they are no longer there
    gone: str | None = None  # the name of the result file that is no longer there


@dataclass
class Record:
    """A run as it is now: what was repeated after a resume is there once."""

    directory: Path
    starts: list[Event] = field(default_factory=list)
    training: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> name -> mean since the step before
    evaluations: list[Evaluation] = field(default_factory=list)  # of each file by step
    refreshes: list[Event] = field(default_factory=list)  # of the index
    flags: dict[str, Flag] = field(default_factory=dict)
    seconds: float = 0.0  # from each start to the last line that it wrote

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def main_start(self) -> Event:
        """The last start of the training, whose flags are in `opt.log`; of a run that evaluates alone, the last."""
        return next((start for start in reversed(self.starts) if not _only_evaluates(start)), (self.starts or [{}])[-1])

    @property
    def files(self) -> list[str]:
        """The names of the files that were evaluated."""
        return list(dict.fromkeys(evaluation.file for evaluation in self.evaluations))

    def of_file(self, file: str) -> list[Evaluation]:
        """The evaluations of one file, by step."""
        return [evaluation for evaluation in self.evaluations if evaluation.file == file]


def read_record(directory: Path) -> Record:
    """Read the files of a run.

    Raises:
        ValueError: there is nothing of a run in the directory.
        OSError: a file cannot be read.
    """
    measured = list(_from_metrics(directory / "metrics.jsonl"))
    flags = _read_flags(directory / "opt.log")
    # A run that an earlier version began has its beginning in run.log alone.
    before = measured[0]["time"] - 1 if measured else float("inf")
    logged = [event for event in _from_log(directory / "run.log", flags) if event["time"] < before]
    while logged and measured and logged[-1]["kind"] == "start":
        logged.pop()  # the line of run.log about the start that metrics.jsonl begins with
    record = Record(directory, flags=flags)
    _put_together([*logged, *measured], record)
    if not record.evaluations:
        record.evaluations = list(_from_results(directory))
    if not (record.starts or record.evaluations):
        raise ValueError(f"{directory} holds nothing of a run: neither metrics.jsonl, run.log nor result files")
    return record


def _put_together(events: Iterable[Event], record: Record) -> None:
    """The last event of a kind, step and file counts. A training that resumes after a step forgets what follows it."""
    evaluations: dict[tuple[str, int], Event] = {}
    refreshes: dict[int, Event] = {}
    started = last = None
    for event in events:
        kind, step, at = event["kind"], event["step"], event["time"]
        if kind == "start":
            record.seconds += last - started if started is not None else 0.0
            started = at
            record.starts.append(event)
            if not _only_evaluates(event):
                record.training = {s: values for s, values in record.training.items() if s <= step}
                evaluations = {key: seen for key, seen in evaluations.items() if key[1] <= step}
                refreshes = {s: seen for s, seen in refreshes.items() if s <= step}
        elif kind == "train":
            values = {k: v for k, v in event.items() if k not in ("kind", "step", "time") and _is_number(v)}
            record.training[step] = values
        elif kind == "evaluation":
            evaluations[event["file"], step] = event
        elif kind == "refresh":
            refreshes[step] = event
        last = at
    record.seconds += last - started if started is not None and last is not None else 0.0
    record.training = dict(sorted(record.training.items()))
    record.refreshes = [refreshes[step] for step in sorted(refreshes)]
    files = list(dict.fromkeys(file for file, _ in evaluations))
    record.evaluations = [
        _evaluation(evaluations[file, step], record.directory)
        for file in files
        for step in sorted(step for of_file, step in evaluations if of_file == file)
    ]


def _evaluation(event: Event, directory: Path) -> Evaluation:
    metrics = {name: value for name, value in event["metrics"].items() if _is_number(value)}
    named = event.get("results")
    path = directory / Path(named).name if named else None  # the run may have been moved
    found = path is not None and path.is_file()
    return Evaluation(
        event["file"],
        event["step"],
        metrics,
        event.get("seconds"),
        event.get("examples"),
        path if found else None,
        path.name if path is not None and not found else None,
    )


def _only_evaluates(start: Event) -> bool:
    return Path((start.get("command") or [""])[0]).name == "evaluate.py"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _from_metrics(path: Path) -> Iterator[Event]:
    """The lines that are whole: a run that was killed may have cut one off."""
    if not path.is_file():
        return
    needed = {"start": (), "train": (), "evaluation": ("file", "metrics"), "refresh": ()}
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or not _is_number(event.get("time")) or not isinstance(event.get("step"), int):
            continue
        if event.get("kind") in needed and all(name in event for name in needed[event["kind"]]):
            yield event


def _from_log(path: Path, flags: Mapping[str, Flag]) -> list[Event]:
    """What run.log says, in the form of metrics.jsonl; a start counts as one of evaluate.py if it took no step."""
    if not path.is_file():
        return []
    events: list[Event] = []
    start: Event = {}  # of the lines that are read
    dataset: Event = {}  # the evaluation whose second line comes next
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (found := LINE.fullmatch(line)):
            continue
        at, text = time.mktime(time.strptime(found[1], "%m/%d/%Y %H:%M:%S")), found[2]
        if found := START.fullmatch(text):
            start = {"kind": "start", "time": at, "step": 0, "device": found[1], "versions": {"torch": found[2]}}
            start["command"] = ["evaluate.py"]
            events.append(start)
        elif found := RESUME.fullmatch(text):
            start |= {"step": int(found[1]), "command": None}
        elif (found := TRAIN.fullmatch(text)) and " | lr: " in text:
            start["command"] = None  # which script it was is not known, but it trained
            events.append({"kind": "train", "time": at, "step": int(found[1]), **_values(found[2])})
        elif found := DATASET.fullmatch(text):
            pairs = [part.split(" ", 1) for part in found[2].split(" | ")]
            metrics = {name: _number(value) for value, name in pairs if _number(value) is not None}
            dataset = {"kind": "evaluation", "time": at, "file": found[1], "metrics": metrics}
        elif (found := EVALUATED.fullmatch(text)) and dataset:
            dataset |= {"examples": int(found[1]), "seconds": float(found[2]), "results": found[3]}
            dataset["step"] = _step_of(dataset, events, flags)
            events.append(dataset)
            dataset = {}
    return events


def _values(text: str) -> dict[str, float]:
    """`loss/train_loss: 1.1 | lr: 0.5 | Memory: 0.71 GiB` with the names of metrics.jsonl."""
    values = {}
    for part in text.split(" | "):
        name, _, value = part.rpartition(": ")
        if (number := _number(value.removesuffix(" GiB"))) is not None:
            values["peak_memory_gib" if name == "Memory" else name] = number
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _step_of(evaluation: Event, before: list[Event], flags: Mapping[str, Flag]) -> int:
    """The step in the result file's name; without one, the next step after which an evaluation was due."""
    if evaluation["results"] and (found := re.search(r"-step-(\d+)\.jsonl$", evaluation["results"])):
        return int(found[1])
    steps = [event["step"] for event in before if event["kind"] == "train"]
    same = [e["step"] for e in before if e["kind"] == "evaluation" and e["file"] == evaluation["file"]]
    every, total = (int(flags[name].value) if name in flags else 0 for name in ("eval_freq", "total_steps"))
    if not steps and not same or not every:
        return max([*steps, 0])
    due = max(-(-max(steps, default=0) // every), max(same, default=0) // every + 1) * every
    return min(due, total) if total else due


def _from_results(directory: Path) -> Iterator[Evaluation]:
    """What the names of result files say, where no log is left."""
    found = [(re.fullmatch(r"(.+)-step-(\d+)\.jsonl", path.name), path) for path in directory.glob("*-step-*.jsonl")]
    for match, path in sorted(((m, p) for m, p in found if m), key=lambda pair: (pair[0][1], int(pair[0][2]))):
        yield Evaluation(match[1], int(match[2]), {}, results=path)


def _read_flags(path: Path) -> dict[str, Flag]:
    if not path.is_file():
        return {}
    flags = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#") and (found := FLAG.fullmatch(line)):
            default = re.search(r"default: (.*)", found[3] or "")
            flags[found[1]] = Flag(found[2], default[1] if default else None)
    return flags
