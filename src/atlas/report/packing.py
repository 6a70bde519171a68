"""Many values in little space: JSON, in pieces that are compressed, so that a browser unpacks only what it shows."""

import base64
import json
import math
import zlib
from hashlib import blake2b
from typing import Any

PIECE = 1 << 18  # bytes of JSON: a browser unpacks it in a few milliseconds


def finite(number: float | None) -> float | None:
    """A number as JSON knows it: None for what has no value."""
    return number if number is None or math.isfinite(number) else None


class Packed:
    """A list of values. In memory there are the compressed pieces, and at most one that is not.

    Attributes:
        pieces: base64 of zlib's format, which `DecompressionStream("deflate")` reads, of a JSON list each.
        starts: the index of the first value of each piece.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.starts: list[int] = []
        self._values: list[str] = []  # of the piece that is not full
        self._size = self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, value: Any) -> int:
        """The index of the value."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self._values.append(text)
        self._size += len(text)
        self._count += 1
        if self._size >= PIECE:
            self.finish()
        return self._count - 1

    def finish(self) -> None:
        """Compress what is left. More may be added."""
        if self._values:
            # Half of a surrogate pair, which old result files may have, becomes a question mark.
            content = f"[{','.join(self._values)}]".encode("utf-8", errors="replace")
            self.starts.append(self._count - len(self._values))
            self.pieces.append(base64.b64encode(zlib.compress(content)).decode("ascii"))
            self._values, self._size = [], 0

    @property
    def size(self) -> int:
        """Bytes of the pieces."""
        return sum(len(piece) + 1 for piece in self.pieces)


class Distinct:
    """Packs each of some values once."""

    def __init__(self) -> None:
        self.packed = Packed()
        self._seen: dict[bytes, int] = {}  # digest -> index

    def add(self, value: list[str]) -> int:
        """The index of the value, which may have been added before."""
        digest = blake2b("\0".join(value).encode("utf-8", errors="replace"), digest_size=16).digest()
        if digest not in self._seen:
            self._seen[digest] = self.packed.add(value)
        return self._seen[digest]
