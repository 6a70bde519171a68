"""A saved index follows its corpus without being built again: passages are added, replaced and deleted by their ids."""

import copy
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from atlas.embedding import CorpusEmbedder
from atlas.files.jsonl import JsonlCorpus
from atlas.index.codec import Codec
from atlas.index.directory import Description
from atlas.index.store import Content, map_codes, map_embeddings, open_codec, passages_of
from atlas.index.update import COMPACT_FROM, Changes, find_changes, opened_to_update, share_deleted, write_changes
from atlas.runtime import distributed
from atlas.runtime.tracking import log

_EMBEDDED_AGAIN = 64  # passages of the index, at most
# Of an embedding's squared length: other precisions make less than a hundredth of that, other formats far more.
_MOST_OFF = 0.01
_MEASURED = 1000  # new embeddings, at most, whose codes are compared with them
_ENCODED_AT_ONCE = 2**14
# Times the quantizer's error of passages that are there, which varies by some 5 % between samples of 64; and beyond it,
# for quantizers that have next to none.
_MUCH_WORSE, _WORSE = 1.25, 0.01


def update_index(
    directory: Path,
    embedder: CorpusEmbedder | None = None,
    passages: JsonlCorpus | None = None,
    delete: Collection[str] = (),
) -> Changes:
    """Add, replace and delete passages of a saved index, in one step. Collective.

    A search finds the new ones and none of the old ones from the next opening on. Passages that the index has word for
    word are left as they are. New ones are embedded, and encoded with the quantizer that the index has. An update that
    is killed goes on where it was when it is started again.

    Args:
        embedder: embeds as those in the index were embedded; None if nothing is added.
        passages: new and changed ones.
        delete: ids.

    Returns: what was changed.

    Raises:
        ValueError: as `find_changes`; the index is damaged, in an older format, or being written; it was made by
            another encoder, or its passages come out of this one otherwise than they are stored.
        OSError: the directory cannot be written to.
    """
    directory = Path(directory)
    with opened_to_update(directory) as description:
        encoder = _checked_encoder(directory, description, embedder) if passages is not None else None
        changes = find_changes(directory, description, passages, delete)
        added = None
        if passages is not None and len(changes.unchanged) < len(passages):
            new = copy.copy(passages)
            new.drop(changes.unchanged)
            first_row = description.size - len(changes.leaving)
            added = _embedded(directory, description, embedder, encoder, new, first_row)
        if added is not None or len(changes.leaving):
            precision = embedder.precision if embedder else None
            description = write_changes(directory, description, changes.leaving, added, precision)
    _tell(directory, description, changes, len(added.passages) if added else 0)
    return changes


def _checked_encoder(directory: Path, description: Description, embedder: CorpusEmbedder) -> str:
    """The fingerprint of the encoder. Raises: ValueError unless it made the index, as far as that is known."""
    found, made_by = embedder.fingerprint(), description.retriever
    if embedder.retriever.dim != description.dimension:
        raise ValueError(
            f"{directory} holds embeddings of size {description.dimension}, the retriever makes them of size "
            f"{embedder.retriever.dim}: use the retriever that the index was made with"
        )
    if made_by not in (None, found):
        raise ValueError(
            f"{directory} was made by the passage encoder {made_by}, and new passages would be embedded by {found}: "
            "use the model that it was made with, or build the index anew"
        )
    if description.embedder_precision not in (None, embedder.precision):
        log.info(
            "%s: embedded in %s, and new passages in %s", directory, description.embedder_precision, embedder.precision
        )
    return found


def _embedded(
    directory: Path,
    description: Description,
    embedder: CorpusEmbedder,
    encoder: str,
    passages: JsonlCorpus,
    first_row: int,
) -> Content:
    """This rank's new passages, embedded, and encoded as the index is. Collective.

    Args:
        encoder: its fingerprint.
        first_row: of the first new passage.
    """
    codec = distributed.on_every_rank("opening the quantizer", partial(_codec, directory, description))
    error = distributed.on_main(
        "embedding passages of the index again", partial(_compare, directory, description, embedder, codec)
    )
    rows = distributed.shard_rows(len(passages), distributed.rank(), distributed.world_size())
    embeddings = torch.empty(len(rows), description.dimension, dtype=torch.float16)

    def store(start: int, of_window: torch.Tensor) -> None:
        embeddings[start : start + len(of_window)] = of_window

    with embedder.journal(directory, passages, embedder.identity(passages, encoder)) as journal:
        embedder.embed_share(passages, rows, store, journal)
    if codec is not None and len(rows) and distributed.is_main():
        _tell_fit(directory, description, codec, embeddings[:: -(-len(rows) // _MEASURED)], error)
    codes = (
        codec.encode(embeddings[start : start + _ENCODED_AT_ONCE], first_row + rows.start + start)
        for start in range(0, len(rows), _ENCODED_AT_ONCE)
    )
    stored = embeddings if description.has_embeddings else None
    return Content(passages, rows, stored, codec, codes if codec else ())


def _codec(directory: Path, description: Description) -> Codec | None:
    return open_codec(directory, description) if description.quantizer else None


def _compare(directory: Path, description: Description, embedder: CorpusEmbedder, codec: Codec | None) -> float:
    """Embed some passages of the index again. Returns: the quantizer's mean error of them, 0 without one.

    Raises:
        ValueError: they come out otherwise than they are stored.
    """
    there, n = passages_of(directory, description), description.segments[0].live  # those of the first build
    numbers = sorted({i * (n - 1) // (_EMBEDDED_AGAIN - 1) for i in range(_EMBEDDED_AGAIN)})
    embeddings = embedder.embed(there[numbers])
    live = map_codes if codec else map_embeddings
    stored = live(directory, description, range(description.size)).index_select(0, torch.tensor(numbers))
    error = _errors(codec, embeddings, torch.from_numpy(codec.encode(embeddings, 0)[0]) if codec else embeddings)
    off = _errors(codec, embeddings, stored) - error
    if (off > _MOST_OFF).any():
        worst = there[numbers[int(off.argmax())]]["id"]
        raise ValueError(
            f"{directory}: {int((off > _MOST_OFF).sum())} of {len(numbers)} of its passages, embedded again, come out "
            f"otherwise than they are stored ({worst!r} most of all): give the model, the --text_maxlength, the "
            "--retriever_format and whatever else the index was built with"
        )
    return float(error.mean())


def _errors(codec: Codec | None, embeddings: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Squared distances of embeddings `(n, D)` and what is stored of them, over their squared lengths: `(n,)`."""
    embeddings = embeddings.float()
    if codec is not None:
        embeddings, stored = codec.rotate(embeddings), torch.from_numpy(codec.decode(stored.numpy()))
    return (embeddings - stored.float()).square().sum(1) / embeddings.square().sum(1)


def _tell_fit(
    directory: Path, description: Description, codec: Codec, embeddings: torch.Tensor, error_before: float
) -> None:
    """Log what the quantizer, which is not trained again, loses of new embeddings `(n, D)`, and when that is much."""
    if len(embeddings) < _EMBEDDED_AGAIN:
        return
    error = float(_errors(codec, embeddings, torch.from_numpy(codec.encode(embeddings, 0)[0])).mean())
    said = "The quantizer of %s is off by %.1f %% of a new embedding's squared length, and by %.1f %% of those before"
    log.info(said, directory, 100 * error, 100 * error_before)
    if error > max(_MUCH_WORSE * error_before, error_before + _WORSE):
        how = "preprocessing/convert_index.py does so" if description.has_embeddings else "build the index anew"
        log.warning("It was trained on other passages than those that came now: training it again may pay (%s)", how)


def _tell(directory: Path, description: Description, changes: Changes, new: int) -> None:
    log.info(
        "%s: %d passages added, %d replaced, %d deleted, %d were there as they are; it has %d",
        directory,
        new - changes.replaced,
        changes.replaced,
        changes.deleted,
        len(changes.unchanged),
        description.size,
    )
    if (share := share_deleted(description)) >= COMPACT_FROM:
        log.info(
            "%.0f %% of its rows are deleted and still take room: `python preprocessing/update_index.py %s --compact` "
            "leaves them out",
            100 * share,
            directory,
        )
