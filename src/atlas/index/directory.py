"""The directory of a saved index: `index.json`, and how one whole index follows another (docs/formats.md).

New files carry a new generation number in their names. `index.json` is replaced last, and the files that it no longer
names are removed after that, so a writer killed at any moment leaves the old index or the new one. All functions here
are for one process at a time.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from atlas.files import cache
from atlas.files.checksums import Blocks, Recorded, of_fields
from atlas.files.disk import existing_directory, writing
from atlas.files.jsonl import replacing
from atlas.files.lock import holding
from atlas.index import arrays
from atlas.index.arrays import AGAIN, BYTE, FP16, HEADER_BYTES, INT64, Array, Layout

VERSION = 2
CONVERTING = "converting.json"
LOCK = "write.lock"
EMBEDDING, EMBEDDING_OF = "embedding.npy", "embedding.json"  # of an index whose corpus is being embedded (journal.py)
_EMBEDDING_NOTES = re.compile(r"embedding\.\d+\.log")
_HEADER_BYTES = {1: 128, 2: HEADER_BYTES}  # of arrays, by version
_OURS = re.compile(
    r"(passages\.\d+\.jsonl(\.offsets\.npy)?|(embeddings|codes|tombstones)\.\d+\.npy|trained\.\d+\.faiss)"
)
_MOST, _MOST_IN_BLOCK, _LARGEST_DIMENSION, _LONGEST_TYPE = 2**53, 2**30, 2**16, 200  # in index.json
_HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")


@dataclass(frozen=True)
class Passages:
    """The text, and what tells it apart from another one at a cost that does not grow with it."""

    file: str
    bytes: int
    sample: str  # hash of blocks spread over the file
    copied_from: str | None  # fingerprint of the corpus; None where a published index had it
    block_bytes: int | None = None  # None: not known, and the text may be a file of the user's under a second name
    blocks: str | None = None  # as in `Array`


@dataclass(frozen=True)
class Quantizer:
    """What made the codes."""

    file: str
    sha256: str
    code_size: int  # bytes per passage


@dataclass(frozen=True)
class Tombstones:
    """The numbers of the rows of a segment that are deleted: `(rows, 1)` int64, ascending."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Segment:
    """Some rows of an index: those of one build, or of one update."""

    size: int  # deleted rows included
    passages: Passages
    embeddings: Array | None
    codes: Array | None
    tombstones: Tombstones | None = None

    @property
    def live(self) -> int:
        """How many rows are not deleted."""
        return self.size - (self.tombstones.rows if self.tombstones else 0)


@dataclass(frozen=True)
class Description:
    """What `index.json` says."""

    type: str  # "flat", or the Faiss factory string of the codes
    dimension: int  # D
    titles_joined: bool  # whether titles hold the section already
    retriever: str | None  # fingerprint of the passage encoder
    embedder_precision: str | None
    source: str | None  # fingerprint of the published index that this was made from
    quantizer: Quantizer | None
    segments: tuple[Segment, ...]
    version: int = VERSION
    identity: str | None = None  # of all that the embeddings depend on, until the index is updated

    @property
    def size(self) -> int:
        """N: the passages that are not deleted."""
        return sum(segment.live for segment in self.segments)

    @property
    def has_embeddings(self) -> bool:
        return self.segments[0].embeddings is not None  # all segments have the same arrays

    @property
    def whole(self) -> Segment | None:
        """The only segment, if nothing of it is deleted: its files hold the index row by row."""
        return self.segments[0] if len(self.segments) == 1 and self.segments[0].tombstones is None else None

    @property
    def embeddings_norm(self) -> float:
        """Bounds the L2 norm of every embedding."""
        return max(segment.embeddings.largest_norm for segment in self.segments)

    @property
    def codes_norm(self) -> float:
        """Bounds the L2 norm of what any code stands for."""
        return max(segment.codes.largest_norm for segment in self.segments)

    def embeddings_layout(self, segment: Segment) -> Layout:
        return Layout(segment.size, self.dimension, FP16, _HEADER_BYTES[self.version])

    def codes_layout(self, segment: Segment) -> Layout:
        return Layout(segment.size, self.quantizer.code_size, BYTE, _HEADER_BYTES[self.version])

    def files(self) -> set[str]:
        """Names of all files of the index but `index.json`."""
        parts = [self.quantizer]
        for segment in self.segments:
            parts += [segment.passages, segment.embeddings, segment.codes, segment.tombstones]
        return {part.file for part in parts if part}

    def recorded(self, directory: Path) -> list[Recorded]:
        """What is to be compared: text and arrays, as far as they have checksums. Opening compares the other files."""
        found = []
        for segment in self.segments:
            if segment.passages.blocks is not None:
                found.append(recorded_text(directory, segment.passages))
            if segment.embeddings:
                found.append(arrays.recorded(directory, segment.embeddings, self.embeddings_layout(segment)))
            if segment.codes:
                found.append(arrays.recorded(directory, segment.codes, self.codes_layout(segment)))
        return [one for one in found if one is not None]


def recorded_text(directory: Path, text: Passages) -> Recorded:
    """What is to be compared of a text that has checksums."""
    return Recorded(directory / text.file, Blocks(text.bytes, text.block_bytes, text.blocks), AGAIN)


def has_index(directory: Path) -> bool:
    """Whether an index of ours was saved there."""
    return (directory / "index.json").is_file()


def read_description(directory: Path) -> Description:
    """What `index.json` says, checked against its own checksum.

    Raises:
        ValueError: it was damaged or edited, or written by a newer version.
    """
    path = directory / "index.json"
    version, fields = read_fields(path)
    try:
        fields = _from_version_1(fields) if version == 1 else fields
        description = description_of(fields | {"version": version})
    except (TypeError, KeyError, AttributeError, RecursionError) as error:  # other fields under a checksum that fits
        raise ValueError(_newer(path, f"other fields ({error})")) from error
    if problem := _problem(description):
        raise ValueError(f"{path} cannot be right ({problem}): {AGAIN}")
    for name in description.files():
        if _OURS.fullmatch(name) is None:
            raise ValueError(f"{path} names files that do not belong to an index: {AGAIN}")
    return description


def description_of(fields: dict) -> Description:
    """The reverse of `asdict`. Raises: TypeError, KeyError when the fields are others, or of another type."""
    return _made(Description, fields)


def _made(kind: Any, value: Any) -> Any:
    """A value of this type, out of JSON. Raises: TypeError, KeyError."""
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0] if value is not None else type(None)
    if get_origin(kind) is tuple:
        return tuple(_made(get_args(kind)[0], item) for item in value)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{name: _made(hints[name], item) for name, item in value.items()})
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{json.dumps(value)[:40]} is no {kind.__name__}")
    return value


def _problem(description: Description) -> str | None:
    """What cannot be right in a description of whose fields each has the right type."""
    quantizer, segments = description.quantizer, description.segments
    if not segments or any((part.embeddings is None) == description.has_embeddings for part in segments):
        return "segments that do not belong together"
    if (quantizer is None) != (description.type == "flat"):
        return "codes without a quantizer, or one without the other"
    if not 0 < description.dimension <= _LARGEST_DIMENSION or (quantizer and not 0 < quantizer.code_size < _MOST):
        return "numbers that are no sizes"
    if len(description.type) > _LONGEST_TYPE or not description.type.isascii():
        return "a type that is none"
    return next((found for part in segments if (found := _problem_of(part, quantizer))), None)


def _problem_of(segment: Segment, quantizer: Quantizer | None) -> str | None:
    """What cannot be right in a segment."""
    arrays = [array for array in (segment.embeddings, segment.codes) if array]
    if (segment.codes is None) != (quantizer is None):
        return "codes without a quantizer, or one without the other"
    if not arrays:
        return "neither embeddings nor codes"
    in_blocks = [*arrays, segment.passages]
    blocks = [1 if part.block_bytes is None else part.block_bytes for part in in_blocks]
    rows = segment.tombstones.rows if segment.tombstones else 1
    if not all(0 < size < _MOST for size in (segment.size, segment.passages.bytes, rows, *blocks)):
        return "numbers that are no sizes"
    if segment.live < 1:
        return "a segment of which everything is deleted"
    if max(blocks) > _MOST_IN_BLOCK or not all(re.fullmatch("([0-9a-f]{8})*", part.blocks or "") for part in in_blocks):
        return "blocks that are none"
    if not all(0 <= array.largest_norm < math.inf for array in arrays):
        return "a norm that is not finite"
    if any((part.block_bytes is None) != (part.blocks is None) for part in in_blocks):
        return "checksums without the size of their blocks, or one without the other"
    return None


def _newer(path: Path, what: str) -> str:
    return f"{path} has {what}: it was written by a newer version of this program, update the program to open it"


def _from_version_1(old: dict) -> dict:
    corpus, compressed, quantizer, codes, embeddings = old["corpus"], old["compressed"], None, None, None
    if compressed:
        quantizer = {"file": compressed["trained"], "sha256": compressed["trained_checksum"]}
        quantizer["code_size"] = compressed["code_size"]
        codes = asdict(Array(compressed["codes"], compressed["largest_norm"], None, None))
    if old["embeddings"]:
        embeddings = asdict(Array(old["embeddings"], old["largest_norm"], None, None))
    passages = Passages(old["passages"], corpus["bytes"], corpus["sample"], old["copied_from"])
    segment = {"size": old["size"], "passages": asdict(passages), "embeddings": embeddings, "codes": codes}
    kept = {name: old[name] for name in ("type", "dimension", "titles_joined", "retriever", "source")}
    return kept | {"embedder_precision": None, "quantizer": quantizer, "segments": [segment | {"tombstones": None}]}


def read_fields(path: Path) -> tuple[int, dict]:
    """The version and the fields that `write_fields` wrote. Raises: ValueError when they were damaged or edited."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version, checksum = fields.pop("version"), fields.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {AGAIN}") from error
    if type(version) is not int or version not in _HEADER_BYTES:
        raise ValueError(_newer(path, f"format version {version!r:.40}, and this one reads up to {VERSION}"))
    if checksum != of_fields(fields):
        raise ValueError(f"{path} was edited or damaged, its checksum does not fit: {AGAIN}")
    return version, fields


def write_fields(path: Path, fields: dict) -> None:
    """Write JSON with a version and a checksum, in one step that survives a power cut as well."""
    content = {"version": VERSION, **fields, "checksum": of_fields(fields)}
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def next_generation(directory: Path) -> int:
    """A number that no file in the directory carries; makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in directory.iterdir() if _OURS.fullmatch(path.name)]
    return 1 + max((int(name.split(".")[1]) for name in names), default=0)


def commit(directory: Path, description: Description) -> None:
    """Make this the index of the directory, in one step, and remove the files of the one before."""
    fields = asdict(description)
    del fields["version"]
    write_fields(directory / "index.json", fields)
    remove_embedding(directory)
    tidy(directory)


def tidy(directory: Path) -> None:
    """Remove what writers left, killed ones too: every file of an index that `index.json` does not name."""
    for path in _leftovers(directory):
        cache.forget(path)
        path.unlink()


def tidy_unless_busy(directory: Path) -> None:
    """`tidy` for those who only read, who need not be able to write: not while another process writes there."""
    if _leftovers(directory) or (directory / LOCK).exists():
        with contextlib.suppress(ValueError), locked(directory):
            tidy(directory)


def _leftovers(directory: Path) -> list[Path]:
    kept = read_description(directory).files() | {"index.json"} if has_index(directory) else set()
    paths = directory.iterdir() if directory.is_dir() else ()
    return [path for path in paths if path.name not in kept and is_leftover(path.name)]


def embedding_notes(directory: Path) -> list[Path]:
    """What each rank noted of the embeddings that it has made so far."""
    return sorted(path for path in directory.glob("embedding.*.log") if _EMBEDDING_NOTES.fullmatch(path.name))


def remove_embedding(directory: Path) -> None:
    """Remove the embeddings of an index that is not finished."""
    for path in (directory / EMBEDDING_OF, *embedding_notes(directory), directory / EMBEDDING):
        path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file of this name was written on the way to an index, and is of no use to another start."""
    half_written = _HALF_WRITTEN.fullmatch(name)
    name = half_written[1] if half_written else name
    named_last = half_written is not None and name in ("index.json", EMBEDDING_OF)
    return bool(_OURS.fullmatch(name)) or name == CONVERTING or named_last


def is_ours(name: str) -> bool:
    """Whether a file or folder of this name is no reason to leave a directory alone in which an index is made."""
    of_embedding = name in (EMBEDDING, EMBEDDING_OF) or _EMBEDDING_NOTES.fullmatch(name) is not None
    return is_leftover(name) or of_embedding or name in (LOCK, cache.FOLDER)


def own_passages(path: Path) -> Passages | None:
    """What is known of this file if it is the text of an index beside it, and nobody else's.

    Text without checksums was saved by an earlier version, which made it a second name of the user's own file.
    """
    if _OURS.fullmatch(path.name) is None or not has_index(path.parent):
        return None
    try:
        texts = [segment.passages for segment in read_description(path.parent).segments]
    except ValueError:  # an index that cannot be opened says nothing about it
        return None
    return next((text for text in texts if text.file == path.name and text.blocks is not None), None)


def remove_index(directory: Path) -> None:
    """Remove an index or what there is of one, and the directory, unless it holds other files as well."""
    (directory / "index.json").unlink(missing_ok=True)
    remove_embedding(directory)
    tidy(directory)
    with contextlib.suppress(OSError):
        directory.rmdir()


def check_space(path: Path, needed: int) -> None:
    """Raises: ValueError when a file or directory that is to be written needs more bytes than its file system has."""
    free = shutil.disk_usage(existing_directory(path)).free
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB free: make room, or choose another "
            "place"
        )


@contextlib.contextmanager
def in_space(path: Path, needed: int) -> Iterator[None]:
    """Check the space before the block writes a file of so many bytes.

    Raises:
        ValueError: there is too little.
        FullDiskError: it is used up meanwhile.
    """
    check_space(path, needed)
    with writing(path, needed):
        yield


def locked(directory: Path) -> AbstractContextManager[None]:
    """Make the directory, and keep other processes from writing an index into it, where the file system can do that.

    Entering it raises: ValueError when another process is in.
    """
    what = f"another process is writing into {directory}"
    return holding(directory / LOCK, what, "wait until it has finished, or choose another directory")


def describe_passages(path: Path, content: Blocks, copied_from: str | None = None) -> Passages:
    """What `index.json` says of a text of which this was written."""
    return Passages(path.name, content.bytes, sample_of(path)[1], copied_from, content.block_bytes, content.blocks)


def sample_of(path: Path) -> tuple[int, str]:
    """Size and a hash of at most 64 blocks of a file."""
    size, digest, blocks, block_bytes = path.stat().st_size, hashlib.sha256(), 64, 4096
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek((size - block_bytes) * block // (blocks - 1) if size > block_bytes else 0)
            digest.update(file.read(block_bytes))
    return size, digest.hexdigest()[:16]


def check_text(directory: Path, expected: Passages) -> None:
    """Raises: ValueError when the passages are not those that the index was made of."""
    path = directory / expected.file
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {AGAIN}")
    size, sample = sample_of(path)
    if size != expected.bytes:
        raise ValueError(f"{path} is {size} bytes long, when the index was made {expected.bytes}: {AGAIN}")
    if sample != expected.sample:
        raise ValueError(f"{path} is not the text that the index was made of, though of the same size: {AGAIN}")


def write_trained(path: Path, content: bytes, code_size: int) -> Quantizer:
    """Write a quantizer."""
    return Quantizer(path.name, _write(path, content), code_size)


def read_trained(directory: Path, quantizer: Quantizer) -> bytes:
    """A quantizer as it was written. Raises: ValueError when it is missing or changed."""
    return _read(directory, quantizer)


def write_tombstones(path: Path, rows: np.ndarray) -> Tombstones:
    """Write the numbers of deleted rows, ascending."""
    content = rows.astype(INT64, copy=False).tobytes()
    return Tombstones(path.name, len(rows), _write(path, Layout(len(rows), 1, INT64).header() + content))


def read_tombstones(directory: Path, segment: Segment) -> np.ndarray:
    """The numbers of a segment's deleted rows, ascending. Raises: ValueError when they are missing or changed."""
    if segment.tombstones is None:
        return np.empty(0, np.int64)
    content, layout = _read(directory, segment.tombstones), Layout(segment.tombstones.rows, 1, INT64)
    if len(content) == layout.offset(layout.size) and content.startswith(layout.header()):
        rows = np.frombuffer(content, INT64, offset=layout.header_bytes).astype(np.int64, copy=False)
        if (np.diff(rows, prepend=-1, append=segment.size) > 0).all():
            return rows
    raise ValueError(f"{directory / segment.tombstones.file} names no rows of its segment: {AGAIN}")


def _write(path: Path, content: bytes) -> str:
    """Write a small file and return its SHA-256."""
    with writing(path, len(content)), open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _read(directory: Path, part: Quantizer | Tombstones) -> bytes:
    """A small file as it was written. Raises: ValueError when it is missing or changed."""
    path = directory / part.file
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {AGAIN}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise ValueError(f"{path} was changed or damaged, its checksum does not fit: {AGAIN}")
    return content
