"""Lines of data that `--bad_lines skip` leaves out: how many, and which."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from atlas.config import Run
from atlas.files.jsonl import BadLine, JsonlCorpus, replacing
from atlas.runtime import distributed
from atlas.runtime.tracking import log

SHOWN = 10_000  # most characters of a line in the file


def bad_lines_file(run: Run, what: str) -> Path | None:
    """Where the bad lines of some data are written; None where one ends the run."""
    return None if run.bad_lines == "error" else Path(run.checkpoint_dir, run.name, f"bad_lines.{what}.jsonl")


def report_bad_lines(corpus: JsonlCorpus, bad: Sequence[BadLine], file: Path) -> list[int]:
    """Say how many lines are bad, and write them to the file, in place of those of an earlier start. Collective.

    Args:
        bad: those of this rank's share, in ascending order.

    Returns:
        The rows of all ranks' bad lines, in ascending order.
    """
    of_ranks = distributed.gather_objects([tuple(line) for line in bad])
    of_all = [BadLine(*line) for of_rank in of_ranks for line in of_rank]
    distributed.on_main("writing the bad lines", partial(_write, corpus, of_all, file))
    if of_all:
        names, where = ", ".join(map(str, corpus.sources)), corpus.where(of_all[0].row)
        log.warning(
            "%s: %d of %d lines are bad and left out, the first is %s: %s. All are in %s",
            *(names, len(of_all), len(corpus), where, of_all[0].reason, file),
        )
    return [line.row for line in of_all]


def _write(corpus: JsonlCorpus, bad: Sequence[BadLine], file: Path) -> None:
    if not bad:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as beside, open(beside, "w", encoding="utf-8", newline="\n") as opened:
        opened.writelines(json.dumps(entry) + "\n" for entry in _entries(corpus, bad))


def _entries(corpus: JsonlCorpus, bad: Sequence[BadLine]) -> Iterator[dict]:
    places = corpus.places(line.row for line in bad)
    for line, (source, number) in zip(bad, places, strict=True):
        text = corpus.raw(line.row).decode("utf-8", errors="replace")
        yield {"file": str(source), "line": number, "reason": line.reason, "text": text[:SHOWN]}
