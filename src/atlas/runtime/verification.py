"""`--verify`: saved files that a run opens are compared with the checksums that they were written with."""

import threading
import time
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from atlas.files.checksums import Recorded, choose_sample
from atlas.runtime import distributed
from atlas.runtime.tracking import log, progress_bar


class _Part(NamedTuple):
    """The blocks of a file that this rank compares."""

    recorded: Recorded
    numbers: list[int]
    file: BinaryIO  # opened at the start: the run may move or replace the file meanwhile

    def compare(self, read: Callable[[], object] = lambda: None) -> None:
        with self.file:
            self.recorded.compare(self.file, self.numbers, read)


class Verification:
    """Compares what a run has opened: all of it at once, or small files at once and a sample of large ones meanwhile.

    Each rank compares its share of the blocks of each file, which for an index are about those of its own rows.

    Args:
        mode: "off", "sample" or "full", as `--verify` says.
        why: why everything is compared, for the log.
    """

    def __init__(self, mode: str, why: str = "--verify full") -> None:
        self.mode, self.why = mode, why
        self._running: list[_InBackground] = []  # as many on every rank

    def check(self, what: str, find: Callable[[], list[Recorded]]) -> None:
        """Compare files, now or from now on in the background. Collective.

        Args:
            what: names all of them in the log.
            find: the files, the same on every rank; an empty list where nothing is known of them.

        Raises:
            ValueError, OSError: on every rank what `find` raises on any; a file is missing, of another length, or, as
                far as it is compared now, not as it was written.
        """
        if self.mode == "off":
            return
        parts = distributed.on_every_rank(f"opening {what}", lambda: [self._part(recorded) for recorded in find()])
        if not parts:
            log.info("%s has no checksums: --verify %s does not look for damage in it", what, self.mode)
            return
        started = time.monotonic()
        at_once = [part for part in parts if self.mode == "full" or part.recorded.is_small]
        with progress_bar(f"checking {what}", sum(len(part.numbers) for part in at_once), "blocks") as bar:
            distributed.on_every_rank(f"checking {what}", lambda: _compare(at_once, bar.update))
        if self.mode == "full":
            log.info("%s: nothing in %s is damaged (%.1f s)", self.why, what, time.monotonic() - started)
        elif later := [part for part in parts if part not in at_once]:
            self._running.append(_InBackground(later))

    def raise_found(self) -> None:
        """Say what was found so far, without waiting for more. Collective. Raises: as `finish`."""
        if self._running:
            distributed.raise_on_all_ranks(next((one.found for one in self._running if one.found), None))

    def finish(self) -> None:
        """Wait until everything is compared: before anything is saved, and before a run ends. Collective.

        Raises:
            ValueError, OSError: on every rank what any has found.
        """
        if self._running:
            distributed.on_every_rank("checking saved files", lambda: [one.join() for one in self._running])
            self._running = []

    def _part(self, recorded: Recorded) -> _Part:
        share = distributed.shard_rows(len(recorded), distributed.rank(), distributed.world_size())
        numbers = choose_sample(len(recorded), share) if self.mode == "sample" else list(share)
        return _Part(recorded, numbers, recorded.open())


class _InBackground:
    """A thread that compares. It holds one block in memory, and calls nothing that waits for other ranks."""

    def __init__(self, parts: list[_Part]) -> None:
        self.found: Exception | None = None
        self._parts = parts
        self._thread = threading.Thread(target=self._run, daemon=True)  # a run that fails does not wait for it
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        if self.found is not None:
            raise self.found

    def _run(self) -> None:
        try:
            _compare(self._parts)
        except Exception as error:  # told to all ranks by the one that joins
            self.found = error


def _compare(parts: list[_Part], read: Callable[[], object] = lambda: None) -> None:
    for part in parts:
        part.compare(read)
