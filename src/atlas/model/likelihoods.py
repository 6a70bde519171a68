"""What a reader that does not learn has found likely, in a file: the next epoch, seed or run need not compute it."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from torch import nn

from atlas import config
from atlas.model.losses import IGNORE
from atlas.model.pretrained import add_weights

APPLICATION = 0x41746C73  # marks our files among SQLite's: "Atls"
WAIT = 600.0  # seconds, for another process to write
AT_ONCE = 500  # keys in one question to SQLite


class KnownLikelihoods:
    """Log-likelihoods of the tokens behind prompts, by reader, prompt and tokens, in an SQLite file.

    Several processes of one machine may read and write it at a time.

    Args:
        path: checked if it is there, else made at the first judgement.
        reader: its weights and its config are part of what is kept.
        precision: of the computation, likewise.

    Raises:
        ValueError: the file is something else, or cannot be read or written.
    """

    def __init__(self, path: Path, reader: nn.Module, precision: str) -> None:
        self.path = path
        digest = hashlib.sha256(precision.encode())
        facts = reader.config.to_dict()
        facts = {name: facts[name] for name in facts if name != "transformers_version" and name[0] != "_"}  # its path
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        add_weights(digest, reader.state_dict())
        self._reader = digest.digest()
        with self._explaining():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._file  # noqa: B018 (what is wrong with it is said before any work)
            elif not os.access(path.parent, os.W_OK):
                raise PermissionError(f"nothing can be written in {path.parent}")

    @cached_property
    def _file(self) -> sqlite3.Connection:
        file = sqlite3.connect(self.path, timeout=WAIT, check_same_thread=False)  # threads that ask take turns
        with file:
            file.execute("BEGIN IMMEDIATE")
            ((known,),) = file.execute("PRAGMA application_id")
            if known == APPLICATION:
                return file
            if file.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise ValueError("it holds something else, give another file")
            file.execute(f"PRAGMA application_id = {APPLICATION}")
            file.execute("CREATE TABLE likelihoods (key BLOB PRIMARY KEY, found BLOB NOT NULL)")
        return file

    @classmethod
    def open(cls, path: str | None, reader: nn.Module, settings: config.Optimisation) -> Self | None:
        """None without a path, and for a reader that does not judge by prompts."""
        return cls(Path(path), reader, settings.precision) if path and not reader.fuses else None

    def key(
        self, prompt: np.ndarray, mask: np.ndarray, labels: np.ndarray, decoder_ids: np.ndarray, temperature: float
    ) -> bytes:
        """What stands for a prompt (L,) and the tokens behind it (T,), without their padding; labels: -100 if free."""
        n = 1 + max(np.flatnonzero(labels != IGNORE), default=-1)  # the first one predicts, and has no place of its own
        parts = prompt[mask], labels[:n], decoder_ids[1:n]
        text = repr(([part.tolist() for part in parts], temperature))
        return hashlib.sha256(self._reader + text.encode()).digest()[:16]

    def recall(self, keys: Sequence[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
        """What is known: (n, width) log-likelihoods, 0 where nothing is, and the numbers of the rows that are not."""
        found: dict[bytes, np.ndarray] = {}
        with self._explaining():
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                query = f"SELECT key, found FROM likelihoods WHERE key IN ({','.join('?' * len(some))})"
                found |= {key: np.frombuffer(value, "<f4") for key, value in self._file.execute(query, some)}
        table, unknown = np.zeros((len(keys), width), np.float32), []
        for row, key in enumerate(keys):
            if (values := found.get(key)) is None or len(values) > width:
                unknown.append(row)
            else:
                table[row, : len(values)] = values
        return table, np.array(unknown, np.int64)

    def keep(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Write what was computed, (n, T): all of it or nothing."""
        values = [(key, np.trim_zeros(row.astype("<f4"), "b").tobytes()) for key, row in zip(keys, rows, strict=True)]
        if not values:
            return
        with self._explaining(), self._file:
            self._file.executemany("INSERT OR REPLACE INTO likelihoods VALUES (?, ?)", values)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise ValueError(f"--cache_judgements {self.path}: {error}") from error
