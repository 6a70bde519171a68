"""One saved index made into another, or into a file of Faiss, without a model: `preprocessing/convert_index.py`."""

import logging
from pathlib import Path

from atlas.index import files
from atlas.index.codec import Compression, code_size
from atlas.index.published import convert_published, fingerprint_published, is_converted, look_at
from atlas.index.sharded import Progress
from atlas.index.storage import check_is_index, compress_index, export_index

log = logging.getLogger("atlas")
_FLAT = "flat"  # directory in the target, where a published index is converted to on its way to a compressed one


def convert(
    source: Path,
    target: Path,
    compression: Compression,
    *,
    codes_only: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> None:
    """Convert a published index, compress an index, or export one, in one process.

    Args:
        target: a new directory, or the one that the same conversion was stopped in; a new file that ends in `.faiss`.
        codes_only: leave the embeddings out of a compressed index.
        progress: told what is going on, how much of it is done, and of how much (None: nobody knows).

    Raises:
        ValueError: there is no index, it cannot be made what is asked for, or the target is taken.
        OSError: a file cannot be read or written.
    """
    check_is_index(source)
    ours = files.has_index(source)
    if target.suffix == ".faiss":
        _export(source, target, compression, ours)
    elif not ours:
        _convert_published(source, target, compression, codes_only, progress)
    elif compression.compresses:
        _compress(source, target, compression, codes_only, progress)
        _tell(target)
    else:
        raise ValueError(
            f"{source} is an index of ours already: say with --faiss_index_type what to compress it to, or end TARGET "
            "in .faiss to export it"
        )


def _export(source: Path, target: Path, compression: Compression, ours: bool) -> None:
    if not ours:
        raise ValueError(f"{source} is a published index: convert it into a directory first, and export that")
    if compression.compresses:
        raise ValueError(f"{target}: what is exported stays as it is: compress into a directory first, and export that")
    if target.exists():
        raise ValueError(f"{target} exists: choose another TARGET, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    export_index(source, target)
    passages = source / files.read_description(source).passages
    log.info("Exported %s to %s; its row i is line i of %s, from 0", source, target, passages)


def _convert_published(
    source: Path, target: Path, compression: Compression, codes_only: bool, progress: Progress
) -> None:
    def report(done: int, of: int) -> None:
        progress("converting", done, of)

    if not compression.compresses:
        if not is_converted(source, target):
            _check_free(target)
        convert_published(source, target, report)
    else:
        found = look_at(source)
        factory = compression.factory(found.size, found.dimension)
        if not _is_compressed(source, target, factory, codes_only):
            _check_free(target)
            more_bytes = found.size * code_size(factory, found.dimension)
            convert_published(source, target / _FLAT, report, more_bytes=more_bytes)
            _compress(target / _FLAT, target, compression, codes_only, progress)
        files.remove_index(target / _FLAT)
    _tell(target)


def _compress(source: Path, target: Path, compression: Compression, codes_only: bool, progress: Progress) -> None:
    _check_free(target)
    files.tidy(target)
    try:
        compress_index(source, target, compression, codes_only=codes_only, progress=progress)
    except (ValueError, OSError):
        files.tidy(target)
        raise


def _tell(target: Path) -> None:
    found = files.read_description(target)
    log.info("%s holds an index of %d passages, of type %s", target, found.size, found.type)


def _is_compressed(source: Path, target: Path, factory: str, codes_only: bool) -> bool:
    """Whether the target holds just that already, made of the same published index."""
    if not files.has_index(target):
        return False
    found = files.read_description(target)
    same = found.source == fingerprint_published(source) and found.type == factory
    return same and (found.embeddings is None) == codes_only


def _check_free(target: Path) -> None:
    """Raises: ValueError unless nothing is there but what a conversion that was stopped has left."""
    if target.is_file():
        raise ValueError(f"{target} is a file: TARGET is a directory, or ends in .faiss")
    if files.has_index(target):
        kind = files.read_description(target).type
        raise ValueError(f"{target} holds another index, of type {kind}: choose another TARGET, or move it away")
    others = [path.name for path in target.glob("*") if not files.is_leftover(path.name) and path.name != _FLAT]
    if others:
        raise ValueError(f"{target} holds other files ({sorted(others)[0]}): TARGET must be a new directory")
