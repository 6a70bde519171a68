"""One saved index made into another, or into a file of Faiss, without a model: `preprocessing/convert_index.py`."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from atlas.files.disk import existing_directory
from atlas.files.jsonl import replacing
from atlas.index import directory as files
from atlas.index.arrays import BYTE, check_all
from atlas.index.build import encode_parts, train_codec
from atlas.index.codec import FLAT, Codec, Compression, code_size, make_empty
from atlas.index.directory import Description
from atlas.index.passages import check_passages
from atlas.index.published import convert_published, fingerprint_published, is_converted, look_at
from atlas.index.store import (
    Content,
    Origin,
    check_is_index,
    checked_passages,
    map_codes,
    map_embeddings,
    open_codec,
    open_index,
    saved_content,
    write_index,
)
from atlas.runtime import distributed
from atlas.runtime.tracking import log, progress_bar

_FLAT = "flat"  # directory in the target, where a published index is converted to on its way to a compressed one


def convert(
    source: Path,
    target: Path,
    compression: Compression,
    *,
    codes_only: bool = False,
) -> None:
    """Convert a published index or one of version 1, compress an index, or export one, in one process.

    Args:
        target: a new directory, or the one that the same conversion was stopped in; a new file that ends in `.faiss`.
        codes_only: leave the embeddings out of a compressed index.

    Raises:
        ValueError: there is no index, it cannot be made what is asked for, or the target is taken.
        OSError: a file cannot be read or written.
    """
    check_is_index(source)
    ours = files.has_index(source)
    if target.suffix == ".faiss":
        _export(source, target, compression, ours)
        return
    if ours and not compression.compresses and files.read_description(source).version == files.VERSION:
        raise ValueError(
            f"{source} is an index of ours already: say with --faiss_index_type what to compress it to, or end TARGET "
            "in .faiss to export it"
        )
    if target.is_file():
        raise ValueError(f"{target} is a file: TARGET is a directory, or ends in .faiss")
    with files.locked(target):
        if not ours:
            _convert_published(source, target, compression, codes_only)
        elif compression.compresses:
            with _all_or_nothing(target):
                compress_index(source, target, compression, codes_only=codes_only)
        else:
            with _all_or_nothing(target):
                _copy_to_this_version(source, target)
    found = files.read_description(target)
    log.info("%s holds an index of %d passages, of type %s", target, found.size, found.type)


def compress_index(
    source: Path,
    target: Path,
    compression: Compression,
    *,
    codes_only: bool = False,
) -> None:
    """Make a compressed index of a saved one that has embeddings, without any model. Collective.

    Rows are encoded and written part by part: memory is for the quantizer's sample, and does not grow with the index.

    Args:
        target: where it is saved; may be the source, which it replaces in one step.

    Raises:
        ValueError: as `open_index` and `save_index`; the source has no embeddings; there is no room for the target.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    check = partial(_check_compressible, source, target, compression, codes_only)
    factory = distributed.on_main("checking the index", check)
    flat = open_index(source, device=torch.device("cpu"), compression=Compression(FLAT[0]))
    codec = train_codec(flat, factory, compression) if factory != FLAT[0] else None
    codes = ((part, norm) for _, part, norm in encode_parts(codec, flat)) if codec else ()
    content = Content(flat.passages, flat.rows, None if codes_only else flat.embeddings, codec, codes, flat.stored)
    write_index(target, content, _origin(flat.stored.description))


def export_index(directory: Path, target: Path) -> None:
    """Write a saved index as one file that `faiss.read_index` reads; its row i is passage i, from 0. For one process.

    A flat index becomes an `IndexScalarQuantizer` of fp16 numbers, which has the values of our embeddings in half the
    bytes of an `IndexFlatIP`; a compressed one what its Faiss factory string makes. The whole of it is in memory once.

    Raises:
        ValueError: no index of ours, damaged files, no room for the target.
        OSError: a file cannot be read or written.
    """
    import faiss  # flat indices are opened and saved without it

    directory, target = Path(directory), Path(target)
    description = files.read_description(directory)
    checked_passages(directory, description)
    rows = range(description.size)
    if description.quantizer:
        codec, codes = open_codec(directory, description), map_codes(directory, description, rows)[:].numpy()
    else:
        codec = Codec(make_empty("SQfp16", description.dimension), "SQfp16")
        # (N, 2D): Faiss's fp16 codes are little-endian numbers too
        codes = map_embeddings(directory, description, rows)[:].numpy().view(BYTE)
    exported = codes.nbytes + (8 * len(codes) if codec.lists else 0)
    files.check_space(target, exported)
    log.info("Exporting %d passages: %.2f GB, in memory and in the file", len(codes), exported / 1e9)
    index = codec.filled(codes)
    with replacing(target) as beside:
        try:
            faiss.write_index(index, str(beside))
        except RuntimeError as error:
            raise OSError(f"{target} cannot be written ({' '.join(str(error).split())})") from error


def check_index(directory: Path) -> None:
    """Read every byte of a saved index and compare it with its checksums. For one process.

    Raises:
        ValueError: the first file that is not as it was written, and where in it.
        OSError: a file cannot be read.
    """
    check_is_index(directory)
    if not files.has_index(directory):
        raise ValueError(f"{directory} is a published index, which has no checksums: convert it, and check that")
    description = files.read_description(directory)
    passages = checked_passages(directory, description)
    with progress_bar("checking the passages", len(passages), "passages") as bar:
        check_passages(passages, range(len(passages)), bar.update)
    rows = range(description.size)
    if description.has_embeddings:
        map_embeddings(directory, description, rows)  # checks the headers
    if description.quantizer:
        open_codec(directory, description)
        map_codes(directory, description, rows)
    for whole in description.recorded(directory):
        check_all(whole)
    if description.version == 1:
        log.warning("%s is of version 1, which has no checksums of arrays: only their sizes were checked", directory)
    log.info("%s: nothing is damaged", directory)


def _check_compressible(source: Path, target: Path, compression: Compression, codes_only: bool) -> str:
    """The factory string of what is asked for. Raises: ValueError when it cannot be made, or there is no room."""
    description = files.read_description(source)
    if not description.has_embeddings:
        raise ValueError(
            f"{source} is an index of type {description.type} without embeddings, which another kind cannot be "
            "made of: compress an index that has embeddings"
        )
    factory = compression.factory(description.size, description.dimension)
    more_bytes = description.size * code_size(factory, description.dimension)
    files.check_space(target, more_bytes + _bytes_copied(source, description, target, codes_only))
    return factory


def _bytes_copied(source: Path, description: Description, target: Path, codes_only: bool) -> int:
    """What takes room of the passages and embeddings of a saved index, because it cannot be linked."""
    same_device = existing_directory(target).stat().st_dev == source.stat().st_dev
    links, text = same_device and description.whole, sum(part.passages.bytes for part in description.segments)
    if links and files.own_passages(source / description.whole.passages.file):
        text = 0
    if codes_only or (links and description.version == files.VERSION):
        return text
    return text + 2 * description.size * description.dimension


def _copy_to_this_version(source: Path, target: Path) -> None:
    description = files.read_description(source)
    checked_passages(source, description)
    content = saved_content(source, description)
    more_bytes = description.size * content.codec.code_size if content.codec else 0
    files.check_space(target, more_bytes + _bytes_copied(source, description, target, content.embeddings is None))
    write_index(target, content, _origin(description))


def _origin(description: Description) -> Origin:
    return Origin(description.retriever, description.embedder_precision, description.source)


def _export(source: Path, target: Path, compression: Compression, ours: bool) -> None:
    if not ours:
        raise ValueError(f"{source} is a published index: convert it into a directory first, and export that")
    if compression.compresses:
        raise ValueError(f"{target}: what is exported stays as it is: compress into a directory first, and export that")
    if target.exists():
        raise ValueError(f"{target} exists: choose another TARGET, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    export_index(source, target)
    if whole := files.read_description(source).whole:
        log.info("Exported %s to %s; its row i is line i of %s, from 0", source, target, source / whole.passages.file)
    else:
        log.info(
            "Exported %s to %s; its row i is passage i of the index, from 0: of its texts in their order, without the "
            "deleted passages (update_index.py --compact makes one text of them, row by row)",
            source,
            target,
        )


def _convert_published(source: Path, target: Path, compression: Compression, codes_only: bool) -> None:
    if not compression.compresses:
        if not is_converted(source, target):
            _check_free(target)
        convert_published(source, target)
        return
    found = look_at(source)
    factory = compression.factory(found.size, found.dimension)
    if not _is_compressed(source, target, factory, codes_only):
        _check_free(target)
        more_bytes = found.size * code_size(factory, found.dimension)
        convert_published(source, target / _FLAT, more_bytes=more_bytes)
        with _all_or_nothing(target):
            compress_index(target / _FLAT, target, compression, codes_only=codes_only)
    files.remove_index(target / _FLAT)


@contextlib.contextmanager
def _all_or_nothing(target: Path) -> Iterator[None]:
    """Write a new index, or leave nothing of it."""
    _check_free(target)
    files.tidy(target)
    try:
        yield
    except (ValueError, OSError):
        files.tidy(target)
        raise


def _is_compressed(source: Path, target: Path, factory: str, codes_only: bool) -> bool:
    """Whether the target holds just that already, made of the same published index."""
    if not files.has_index(target):
        return False
    found = files.read_description(target)
    same = found.source == fingerprint_published(source) and found.type == factory
    return same and found.has_embeddings != codes_only


def _check_free(target: Path) -> None:
    """Raises: ValueError unless nothing is there but what a conversion that was stopped has left."""
    if files.has_index(target):
        kind = files.read_description(target).type
        raise ValueError(f"{target} holds another index, of type {kind}: choose another TARGET, or move it away")
    others = [path.name for path in target.glob("*") if not files.is_ours(path.name) and path.name != _FLAT]
    if others:
        raise ValueError(f"{target} holds other files ({sorted(others)[0]}): TARGET must be a new directory")
