"""The files of a saved index, and how a directory goes from one whole index to the next.

Files carry the number of their generation: `passages.3.jsonl`, `embeddings.3.npy`, and of a compressed index
`trained.3.faiss` (the quantizer) and `codes.3.npy`, which can do without embeddings. `index.json` says which of them
belong together; it is replaced last and the files it no longer names are removed after that, so a writer killed at any
moment leaves the old index or the new one. A published index that is being converted has `converting.json` until it is
done. All this is for one process at a time, but for `write_embeddings` and `write_codes`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from atlas.files.jsonl import replacing
from atlas.index.flat import measure_largest_norm

log = logging.getLogger("atlas")
VERSION = 1
CONVERTING = "converting.json"
WRITE_BYTES = 2**26  # written at a time, between two signs of life
_OURS = re.compile(r"(passages\.\d+\.jsonl(\.offsets\.npy)?|(embeddings|codes)\.\d+\.npy|trained\.\d+\.faiss)")
_HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")
_HEADER_BYTES = 128
_FP16, _BYTE = np.dtype("<f2"), np.dtype("u1")
_AGAIN = "copy the index again, or build it anew"


@dataclass(frozen=True)
class CorpusFingerprint:
    """Tells two corpora apart at a cost that does not grow with them."""

    bytes: int
    rows: int
    sample: str  # hash of blocks spread over the file


@dataclass(frozen=True)
class Compressed:
    """The codes of a compressed index."""

    trained: str  # name of a file: the quantizer
    trained_checksum: str  # of that file
    codes: str  # name of a file
    code_size: int  # bytes per passage
    largest_norm: float  # bounds the L2 norm of every decoded code


@dataclass(frozen=True)
class Description:
    """What `index.json` says."""

    type: str  # of index: "flat", or the Faiss factory string of its codes
    size: int  # N
    dimension: int  # D
    largest_norm: float | None  # bounds the L2 norm of every embedding
    passages: str  # name of a file
    embeddings: str | None  # name of a file; a compressed index can do without
    titles_joined: bool  # whether titles hold the section already
    corpus: CorpusFingerprint
    retriever: str | None  # fingerprint of the encoder, where it is known
    source: str | None = None  # fingerprint of the published index that this was made from
    copied_from: str | None = None  # fingerprint of the files that the passages were copied from
    compressed: Compressed | None = None

    def files(self) -> set[str]:
        """Names of all files of the index but `index.json`."""
        codes = {self.compressed.trained, self.compressed.codes} if self.compressed else set()
        embeddings = {self.embeddings} if self.embeddings else set()
        return {self.passages, f"{self.passages}.offsets.npy"} | embeddings | codes


def has_index(directory: Path) -> bool:
    """Whether an index of ours was saved there."""
    return (directory / "index.json").is_file()


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to an index, and goes with it."""
    return _OURS.fullmatch(name) is not None


def read_description(directory: Path) -> Description:
    """What `index.json` says, checked against its own checksum.

    Raises:
        ValueError: it was damaged or edited, or is of another version.
    """
    path = directory / "index.json"
    fields = read_fields(path)
    nested = {"corpus": CorpusFingerprint(**fields["corpus"])}
    if fields.get("compressed"):
        nested["compressed"] = Compressed(**fields["compressed"])
    description = Description(**fields | nested)
    if not all(map(is_ours, description.files())):
        raise ValueError(f"{path} names files that do not belong to an index: {_AGAIN}")
    return description


def read_fields(path: Path) -> dict:
    """What `write_fields` wrote. Raises: ValueError when it was damaged or edited, or is of another version."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version, checksum = fields.pop("version"), fields.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {_AGAIN}") from error
    if version != VERSION:
        raise ValueError(f"{path} is of format version {version!r}, this program reads {VERSION}: {_AGAIN}")
    if checksum != _checksum(fields):
        raise ValueError(f"{path} was edited or damaged, its checksum does not fit: {_AGAIN}")
    return fields


def write_fields(path: Path, fields: dict) -> None:
    """Write JSON with a version and a checksum, in one step that survives the machine as well."""
    content = {"version": VERSION, **fields, "checksum": _checksum(fields)}
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def next_generation(directory: Path) -> int:
    """A number that no file in the directory carries; makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    return 1 + max((int(path.name.split(".")[1]) for path in directory.iterdir() if is_ours(path.name)), default=0)


def commit(directory: Path, description: Description) -> None:
    """Make this the index of the directory, in one step, and remove the files of the one before."""
    write_fields(directory / "index.json", dataclasses.asdict(description))
    tidy(directory)


def tidy(directory: Path) -> None:
    """Remove what writers left, killed ones too: every file of an index that `index.json` does not name."""
    kept = read_description(directory).files() | {"index.json"} if has_index(directory) else set()
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in kept and is_leftover(path.name):
            path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file of this name was written on the way to an index."""
    half_written = _HALF_WRITTEN.fullmatch(name)
    name = half_written[1] if half_written else name
    return is_ours(name) or name == CONVERTING or (half_written is not None and name == "index.json")


def remove_index(directory: Path) -> None:
    """Remove an index or what there is of one, and the directory, unless it holds other files as well."""
    (directory / "index.json").unlink(missing_ok=True)
    tidy(directory)
    with contextlib.suppress(OSError):
        directory.rmdir()


def existing_directory(path: Path) -> Path:
    """Where something that is to be written will lie, as far as that is there: says on which file system."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def check_space(path: Path, needed: int) -> None:
    """Raises: ValueError when a file or directory that is to be written needs more bytes than its file system has."""
    free = shutil.disk_usage(existing_directory(path)).free
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB free: make room, or choose another "
            "place"
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory, and keep out other processes that ask for the same, where the file system can do that.

    Raises: ValueError when another process is in.
    """
    import fcntl  # not on every system; all but conversions does without

    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing into {directory}: wait until it has finished") from error
        except OSError as error:
            log.debug("%s cannot be locked: %s", directory, error)
        yield
    finally:
        os.close(handle)


def fingerprint_corpus(path: Path, rows: int, blocks: int = 64, block_bytes: int = 4096) -> CorpusFingerprint:
    """Size, number of passages and a hash of at most `blocks` blocks of a file."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek((size - block_bytes) * block // (blocks - 1) if size > block_bytes else 0)
            digest.update(file.read(block_bytes))
    return CorpusFingerprint(size, rows, digest.hexdigest()[:16])


def create_embeddings(path: Path, size: int, dimension: int) -> None:
    """Make the file for `(N, D)` fp16 embeddings, full of zeros."""
    _create_array(path, size, dimension, _FP16)


def create_codes(path: Path, size: int, code_size: int) -> None:
    """Make the file for `(N, code_size)` bytes, full of zeros."""
    _create_array(path, size, code_size, _BYTE)


def write_embeddings(path: Path, first_row: int, embeddings: torch.Tensor, heartbeat: Callable[[], None]) -> float:
    """Write rows `(n, D)` into their place and return what bounds their norms; several processes may do so at once.

    Raises:
        ValueError: a value is not finite in fp16.
    """
    largest = 0.0

    def part(start: int, end: int) -> np.ndarray:
        nonlocal largest
        rows = embeddings[start:end].to("cpu", torch.float16).contiguous()
        largest = max(largest, measure_largest_norm(rows, first_row + start))
        return rows.numpy().astype(_FP16, copy=False)

    _write_rows(path, first_row, embeddings.shape, 2, part, heartbeat)
    return largest


def write_codes(path: Path, first_row: int, codes: np.ndarray, heartbeat: Callable[[], None]) -> None:
    """Write rows `(n, code_size)` uint8 into their place; several processes may do so at once."""
    _write_rows(path, first_row, codes.shape, 1, lambda start, end: np.ascontiguousarray(codes[start:end]), heartbeat)


def map_embeddings(path: Path, size: int, dimension: int) -> np.ndarray:
    """The `(N, D)` fp16 embeddings, memory-mapped; what is written into them stays in this process.

    Raises:
        ValueError: the file is missing, of another size or of another shape.
    """
    return _map_array(path, size, dimension, _FP16)


def map_codes(path: Path, size: int, code_size: int) -> np.ndarray:
    """The `(N, code_size)` uint8 codes, memory-mapped likewise. Raises: as `map_embeddings`."""
    return _map_array(path, size, code_size, _BYTE)


def forget_pages(mapped: np.ndarray) -> None:
    """Give back the memory that reading a memory-mapped array took; its content stays what it is.

    Only for an array that nothing was written into: that would be lost.
    """
    if isinstance(mapped, np.memmap):
        mapped.base.madvise(mmap.MADV_DONTNEED)


def write_trained(path: Path, content: bytes) -> str:
    """Write a quantizer and return its checksum."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def read_trained(path: Path, checksum: str) -> bytes:
    """A quantizer as it was written. Raises: ValueError when it is missing or changed."""
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {_AGAIN}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{path} was changed or damaged, its checksum does not fit: {_AGAIN}")
    return content


def check_corpus(path: Path, expected: CorpusFingerprint) -> None:
    """Raises: ValueError when the passages are not those that the index was made of."""
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {_AGAIN}")
    found = fingerprint_corpus(path, expected.rows)
    if found.bytes != expected.bytes:
        raise ValueError(f"{path} is {found.bytes} bytes long, when the index was made {expected.bytes}: {_AGAIN}")
    if found.sample != expected.sample:
        raise ValueError(f"{path} is not the text that the index was made of, though of the same size: {_AGAIN}")


def _create_array(path: Path, size: int, width: int, dtype: np.dtype) -> None:
    with open(path, "xb") as file:
        file.write(_npy_header(size, width, dtype))
        file.truncate(_npy_bytes(size, width, dtype))


def _write_rows(
    path: Path,
    first_row: int,
    shape: tuple[int, int],
    item_bytes: int,
    part: Callable[[int, int], np.ndarray],
    heartbeat: Callable[[], None],
) -> None:
    """Write what `part(start, end)` gives for all rows, piece by piece."""
    n, width = shape
    step = max(1, WRITE_BYTES // (item_bytes * width))
    with open(path, "r+b") as file:
        file.seek(_HEADER_BYTES + first_row * width * item_bytes)
        for start in range(0, n, step):
            file.write(part(start, min(start + step, n)).data)
            heartbeat()
        file.flush()
        os.fsync(file.fileno())


def _map_array(path: Path, size: int, width: int, dtype: np.dtype) -> np.ndarray:
    what = "fp16 numbers" if dtype == _FP16 else "bytes"
    if not path.is_file():
        raise ValueError(f"{path}, which index.json names, is missing: {_AGAIN}")
    expected, found = _npy_bytes(size, width, dtype), path.stat().st_size
    if found != expected:
        raise ValueError(f"{path} is {found} bytes long, {size} x {width} {what} take {expected}: {_AGAIN}")
    with open(path, "rb") as file:
        if file.read(_HEADER_BYTES) != _npy_header(size, width, dtype):
            raise ValueError(f"{path} does not begin as an array of {size} x {width} {what}: {_AGAIN}")
    if size == 0:  # nothing to map
        return np.zeros((0, width), dtype)
    return np.memmap(path, dtype, "c", offset=_HEADER_BYTES, shape=(size, width))


def _npy_header(size: int, width: int, dtype: np.dtype) -> bytes:
    """Version 1.0 of numpy's format, always of one length, so that it can be compared instead of parsed."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({size}, {width}), }}"
    magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + text.ljust(_HEADER_BYTES - 11).encode() + b"\n"


def _npy_bytes(size: int, width: int, dtype: np.dtype) -> int:
    return _HEADER_BYTES + dtype.itemsize * size * width


def _checksum(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
