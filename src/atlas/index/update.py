"""Passages added to a saved index, replaced and deleted in it, and a compaction that makes one segment of it again.

An update writes a segment for what is new and tombstones for what leaves (docs/formats.md); nothing that is there is
written again. Embeddings are given: `atlas.update` makes them.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atlas.files.jsonl import JsonlCorpus
from atlas.index import directory as files
from atlas.index.directory import Description, Segment
from atlas.index.passages import fingerprint_of, titles_joined
from atlas.index.store import (
    Content,
    Origin,
    all_passages_of,
    check_is_index,
    checked_passages,
    deleted_rows,
    remove_what_failed,
    saved_content,
    write_arrays,
    write_index,
    write_lines,
)
from atlas.runtime import distributed
from atlas.runtime.tracking import log, read_shares

COMPACT_FROM = 0.2  # of all rows: so many that are deleted are worth a compaction
_NAMED = 5  # of ids in a message


@dataclass(frozen=True)
class Changes:
    """What new passages and ids to delete mean for an index."""

    leaving: np.ndarray  # (m,) int64: rows that are deleted, counted through all segments, ascending
    unchanged: np.ndarray  # (u,) int64: rows of the new passages that the index holds as they are, ascending
    replaced: int  # new passages whose id the index has
    deleted: int  # ids to delete that the index has


@contextlib.contextmanager
def opened_to_update(directory: Path) -> Iterator[Description]:
    """What an index says of itself, which others are kept from changing during the block. Collective.

    Raises:
        ValueError: there is no index, it is damaged, or in an older format; another process writes into it.
    """
    distributed.on_main("looking for the index", partial(check_is_index, directory))  # a lock makes the directory
    with distributed.held_on_main("locking the index", partial(files.locked, directory)):
        fields = distributed.on_main("checking the index", lambda: asdict(_checked(directory)))
        yield files.description_of(fields)


def _checked(directory: Path) -> Description:
    description = files.read_description(directory) if files.has_index(directory) else None
    if description is None or description.version != files.VERSION:
        kind = "a published index" if description is None else f"an index of version {description.version}"
        raise ValueError(
            f"{directory} is {kind}: make one of version {files.VERSION} of it (python preprocessing/convert_index.py "
            f"{directory} DIRECTORY), and update that"
        )
    checked_passages(directory, description)  # finds the offsets of the lines, before the other ranks need them
    files.tidy(directory)  # what killed writers left may take the room that is needed
    return description


def find_changes(
    directory: Path, description: Description, passages: JsonlCorpus | None, delete: Collection[str]
) -> Changes:
    """Look up ids in the text of the index, which is read once: each rank reads its share. Collective.

    All passages of an id that stands several times in the index are replaced, or deleted.

    Raises:
        ValueError: an id stands twice among the new passages, or is to be deleted as well; ids to delete that the index
            has not had; no passage would be left.
    """
    of_new = _rows_by_id(passages) if passages is not None else {}
    if both := [identifier for identifier in dict.fromkeys(delete) if identifier in of_new]:
        raise ValueError(f"ids to delete are among the new passages as well{_some(both)}: keep each in one of both")
    to_delete = list(dict.fromkeys(delete))
    wanted = of_new | {identifier: -1 - i for i, identifier in enumerate(to_delete)}
    found = _look_up(directory, description, passages, wanted)
    row, of, same, live = found.T
    if unknown := [to_delete[i] for i in sorted(set(range(len(to_delete))) - set((-1 - of[of < 0]).tolist()))]:
        raise ValueError(f"ids to delete are not in {directory}{_some(unknown)}: leave them out; nothing was changed")
    if already := len(to_delete) - len(set(of[(of < 0) & (live == 1)].tolist())):
        log.info("Deleted before: %d of %d ids", already, len(to_delete))
    row, of, same = row[live == 1], of[live == 1], same[live == 1]
    numbers, counts = np.unique(of, return_counts=True)
    unchanged = of[(same == 1) & np.isin(of, numbers[counts == 1])]
    leaves = ~np.isin(of, unchanged)
    leaving, numbers = row[leaves], np.unique(of[leaves])
    if description.size - len(leaving) + len(of_new) - len(unchanged) == 0:
        raise ValueError(f"nothing would be left of {directory}: remove the directory instead")
    return Changes(np.sort(leaving), np.sort(unchanged), int((numbers >= 0).sum()), int((numbers < 0).sum()))


def _rows_by_id(passages: JsonlCorpus) -> dict[str, int]:
    """The row of every id, on every rank. Collective. Raises: ValueError if one stands twice."""

    def read(rows: range, report: Callable[[int], object]) -> list[str]:
        found = []
        for row in rows:
            found.append(passages[row]["id"])
            report(1)
        return found

    of_ranks = distributed.gather_objects(read_shares("reading the new passages", len(passages), "passages", read))
    by_id: dict[str, int] = {}
    for row, identifier in enumerate(identifier for of_rank in of_ranks for identifier in of_rank):
        if identifier in by_id:
            first, second = passages.where(by_id[identifier]), passages.where(row)
            raise ValueError(f"{second}: the id {identifier!r} stands in {first} as well: keep one of both")
        by_id[identifier] = row
    return by_id


def _look_up(
    directory: Path, description: Description, passages: JsonlCorpus | None, wanted: dict[str, int]
) -> np.ndarray:
    """The rows of the index with these ids: `(m, 4)` int64. Collective.

    Columns: the row, counted through all segments; what `wanted` says of its id, from 0 on a row of the new passages;
    whether the passage is the same as that; whether it is not deleted.
    """
    there, deleted = all_passages_of(directory, description), deleted_rows(directory, description)
    live = np.ones(len(there), bool)
    live[deleted] = False

    def read(rows: range, report: Callable[[int], object]) -> np.ndarray:
        found = []
        for row in rows:
            passage = there[row]
            if (of := wanted.get(passage["id"])) is not None:
                found.append((row, of, of >= 0 and passage == passages[of], live[row]))
            report(1)
        return np.array(found, np.int64).reshape(-1, 4)

    return np.concatenate(distributed.gather_objects(read_shares("looking for the ids", len(there), "passages", read)))


def _some(identifiers: list[str]) -> str:
    more = ", ..." if len(identifiers) > _NAMED else ""
    return f" ({len(identifiers)}: {', '.join(map(repr, identifiers[:_NAMED]))}{more})"


def write_changes(
    directory: Path, description: Description, leaving: np.ndarray, added: Content | None, precision: str | None
) -> Description:
    """Write new segment and tombstones, and replace `index.json` last; if that fails, nothing is left. Collective.

    Args:
        leaving: as in `Changes`.
        added: this rank's part of the new passages, with embeddings, codes, or both, as the index has them.
        precision: that their embeddings were computed in.

    Returns: what the index says of itself now.

    Raises:
        ValueError: an embedding is not finite, or there is no room.
        OSError: the directory cannot be written to.
    """
    prepare = partial(_prepare, directory, description, leaving, added, precision)
    try:
        generation, fields = distributed.on_main("writing the changes", prepare)
        updated = files.description_of(fields)
        if added is not None:
            *others, segment = updated.segments
            segment = write_arrays(directory, generation, updated, segment, added)
            updated = replace(updated, segments=(*others, segment))
        distributed.on_main("replacing the index", partial(files.commit, directory, updated))
    except (ValueError, OSError):
        distributed.on_main("removing what was written", partial(remove_what_failed, directory))
        raise
    return updated


def _prepare(
    directory: Path, description: Description, leaving: np.ndarray, added: Content | None, precision: str | None
) -> tuple[int, dict[str, Any]]:
    """On rank 0: tombstones and the new text. Returns: the generation, and the fields of the description."""
    generation = files.next_generation(directory)
    segments = _without(directory, generation, description.segments, leaving)
    if added is not None:
        path = directory / f"passages.{generation}.jsonl"
        join_titles = description.titles_joined and not titles_joined(added.passages)
        content = write_lines(added.passages, path, join_titles=join_titles)
        JsonlCorpus(path)  # leaves the offsets of its lines beside it
        copied_from = None if description.titles_joined else fingerprint_of(added.passages)
        text = files.describe_passages(path, content, copied_from)
        segments.append(Segment(len(added.passages), text, embeddings=None, codes=None))
        if precision != description.embedder_precision:
            description = replace(description, embedder_precision=None)
    # this is no longer what comes out of a published index, or of one corpus
    return generation, asdict(replace(description, segments=tuple(segments), source=None, identity=None))


def _without(directory: Path, generation: int, segments: tuple[Segment, ...], leaving: np.ndarray) -> list[Segment]:
    """The segments with tombstones for what leaves them. One that loses all of its rows is left out."""
    kept, first = [], 0
    for number, segment in enumerate(segments):
        rows = leaving[(leaving >= first) & (leaving < first + segment.size)] - first
        first += segment.size
        if len(rows) == segment.live:
            continue
        if len(rows):
            rows = np.union1d(files.read_tombstones(directory, segment), rows)
            tombstones = files.write_tombstones(directory / f"tombstones.{generation + number}.npy", rows)
            segment = replace(segment, tombstones=tombstones)
        kept.append(segment)
    return kept


def share_deleted(description: Description) -> float:
    """How many of all rows are deleted and still take room."""
    return 1 - description.size / sum(segment.size for segment in description.segments)


def compact_index(directory: Path) -> None:
    """Make one segment of an updated index: what is deleted is left out, and takes no more room. Collective.

    Search finds the same before and after. The index is replaced in one step.

    Raises:
        ValueError: there is no such index, it is damaged, or there is no room for the second one.
        OSError: a file cannot be read or written.
    """
    directory = Path(directory)
    with opened_to_update(directory) as description:
        if description.whole:
            log.info("%s is one segment without deleted passages: there is nothing to compact", directory)
            return
        origin = Origin(description.retriever, description.embedder_precision, description.source)
        content = distributed.on_every_rank("opening the index", partial(saved_content, directory, description))
        write_index(directory, content, origin)
    log.info("Compacted %s: %d passages", directory, description.size)
