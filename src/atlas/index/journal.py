"""Embeddings on their way to a saved index, on disk window by window: whoever is killed loses the window at hand.

The rows lie in `embedding.npy`, from the start as long as the array of the index. Each rank notes in a file of its own
which of them it has written, with their checksum, so nothing depends on what reached the disk first. Any number of
ranks can read what another number has written.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from atlas.files.disk import writing
from atlas.index import directory as files
from atlas.index.arrays import FP16, Layout, as_tensor, check_header, create, map_rows, write_at
from atlas.runtime import distributed
from atlas.runtime.tracking import log

_NOTE = re.compile(r"(\d+) (\d+) ([0-9a-f]{8})\n")  # first row, the one after the last, CRC-32


class EmbeddingJournal:
    """Notes what is embedded. One rank's part of it; made by `open_journal`.

    Args:
        array, notes: descriptors of the file of all rows, and of this rank's notes.
    """

    def __init__(self, directory: Path, layout: Layout, array: int, notes: int) -> None:
        self._directory, self._layout, self._array, self._notes = directory, layout, array, notes

    def restore(self, rows: range, store: Callable[[int, torch.Tensor], None]) -> np.ndarray:
        """Which of these rows are there, (n,) bool. They are given to `store(place in rows, (m, D) fp16)`."""
        there = np.zeros(len(rows), bool)
        for written, checksum in self._written():
            first, end = max(written.start, rows.start), min(written.stop, rows.stop)
            if first >= end:
                continue
            content = map_rows(self._directory / files.EMBEDDING, self._layout, written)
            if zlib.crc32(content) == checksum:
                store(first - rows.start, as_tensor(content[first - written.start : end - written.start]))
                there[first - rows.start : end - rows.start] = True
            distributed.progress()
        return there

    def add(self, first_row: int, embeddings: torch.Tensor) -> None:
        """Write the embeddings `(n, D)` fp16 of the rows of the corpus from `first_row` on.

        Raises:
            FullDiskError: there is no space for them.
        """
        content = embeddings.to("cpu", torch.float16).contiguous().numpy().astype(FP16, copy=False)
        path, size = self._directory / files.EMBEDDING, self._layout.offset(self._layout.size)
        with writing(path, size):
            write_at(self._array, content.reshape(-1).view(np.uint8), self._layout.offset(first_row))
            note = f"{first_row} {first_row + len(content)} {zlib.crc32(content):08x}\n"
            os.write(self._notes, note.encode())

    def _written(self) -> Iterator[tuple[range, int]]:
        """What all ranks have noted: rows and their checksum. A note that was cut off is none."""
        for path in files.embedding_notes(self._directory):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
                if (match := _NOTE.fullmatch(line)) and int(match[1]) < int(match[2]) <= self._layout.size:
                    yield range(int(match[1]), int(match[2])), int(match[3], 16)


@contextlib.contextmanager
def open_journal(directory: Path, identity: str, layout: Layout) -> Iterator[EmbeddingJournal]:
    """The journal of a directory in which an index is to be saved, while its corpus is embedded. Collective.

    What a stopped or killed process left there is used if it is of the same identity, and removed otherwise.

    Args:
        identity: of everything that determines the embeddings.
        layout: of the array of them.

    Raises:
        ValueError: there is too little space for the array.
        OSError: the directory cannot be written to.
    """
    distributed.on_main("preparing the embeddings on disk", partial(_prepare, directory, identity, layout))
    with contextlib.ExitStack() as stack:
        opened = partial(_open, directory, stack)
        yield EmbeddingJournal(directory, layout, *distributed.on_every_rank("opening the embeddings on disk", opened))


def _open(directory: Path, stack: contextlib.ExitStack) -> tuple[int, int]:
    notes = directory / f"embedding.{distributed.rank()}.log"
    places = ((directory / files.EMBEDDING, os.O_WRONLY), (notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    array, notes = (os.open(path, how, 0o666) for path, how in places)
    for file in (array, notes):
        stack.callback(os.close, file)
    stack.callback(os.fsync, array)  # before other ranks, perhaps on other machines, write next to these rows
    os.write(notes, b"\n")  # ends a note that was cut off
    return array, notes


def _prepare(directory: Path, identity: str, layout: Layout) -> None:
    note, array = directory / files.EMBEDDING_OF, directory / files.EMBEDDING
    directory.mkdir(parents=True, exist_ok=True)
    if note.exists():
        try:
            if files.read_fields(note)[1] == {"identity": identity}:
                check_header(array, layout)
                log.info("%s holds embeddings of a start that was stopped: they are not made again", directory)
                return
            log.info("%s holds embeddings of other weights, passages or flags: they are made anew", directory)
        except ValueError as damaged:
            log.warning("All embeddings are made anew: %s", damaged)
    files.remove_embedding(directory)
    files.tidy(directory)  # what killed writers left may take the room that is needed
    with files.in_space(array, layout.offset(layout.size)):
        create(array, layout)
    files.write_fields(note, {"identity": identity})  # last: without it, nothing of the rest counts
