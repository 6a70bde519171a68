"""BM25: every rank indexes the words of its rows, everybody gets the same answers. And the fusion of two rankings.

Scores are those of Lucene's variant ("Which BM25 do you mean?", Kamphuis et al. 2020), without its rounding of lengths.
What a word adds to the score of a passage is computed beforehand ("BM25S", Lù 2024). How many passages have a word and
how long they are is counted over all ranks, so that a score does not depend on how many there are.
"""

import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from atlas import config
from atlas.files import jsonl
from atlas.files.cache import cached, kept
from atlas.files.jsonl import JsonlCorpus
from atlas.files.tensors import save_tensors
from atlas.index.passages import fingerprint_of, hash_id, titles_joined
from atlas.index.sharded import Hits, best_of_ranks
from atlas.runtime import distributed
from atlas.runtime.device import import_bm25s
from atlas.runtime.tracking import log, read_shares

FUSED = 100  # passages of each ranking that are fused, at least
RANK_OFFSET = 60  # of "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods" (2009)
TABLES = ("hashes", "starts", "rows", "weights")  # of a WordIndex
SPLIT = 2  # version of how texts are split into words: what is kept of another one is made again
CHUNK = 4096  # passages whose words are counted together


class WordIndex:
    """The passages of all ranks by their words: this rank has those of its rows, which may lie in a file.

    A word is known by a 64-bit hash. That two of ten million words share one has a chance of 1 in 370,000.
    """

    def __init__(self, tables: dict[str, torch.Tensor], rows: range, size: int, stopwords: str) -> None:
        """Args:
        tables: `hashes` (V,) int64, ascending; `starts` (V + 1,) int64, where the P pairs of each word begin; `rows`
            (P,) int32, from 0 for the first of this rank; `weights` (P,) fp32, what the word adds to the score.
        rows: of the corpus, those of this rank.
        size: N, the passages of all ranks.
        stopwords: `en` or `none`, as they were left out of the passages.
        """
        self.rows, self.size, self.stopwords = rows, size, stopwords
        self.hashes = tables["hashes"].numpy()
        self._scorer = import_bm25s().BM25(method="lucene")
        names = {"data": "weights", "indices": "rows", "indptr": "starts"}
        arrays = {theirs: tables[ours].numpy() for theirs, ours in names.items()}
        self._scorer.scores, self._scorer.nonoccurrence_array = arrays | {"num_docs": len(rows)}, None

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The best min(k, N) passages of each of b queries, whatever rank holds them; on the CPU.

        Collective. Ranks may bring different b, but the same k. A passage with none of a query's words has the score 0.
        The same is found, bit for bit, at every world size.
        """
        k = min(k, self.size)
        of_ranks = distributed.gather_objects(_tokenize(queries, self.stopwords, return_ids=False))
        best = [self._search(words, min(k, len(self.rows))) for of_rank in of_ranks for words in of_rank]
        scores, rows = map(np.stack, zip(*best, strict=True)) if best else np.zeros((2, 0, k))
        found = Hits(torch.from_numpy(scores).float(), torch.from_numpy(rows).long() + self.rows.start)
        return best_of_ranks(found, list(map(len, of_ranks)), k, self.size)

    def _search(self, words: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (k,) fp32 of this rank's best rows, and these (k,)."""
        hashes = np.array([hash_id(word) for word in words], np.int64)
        places = np.searchsorted(self.hashes, hashes)
        known = places < len(self.hashes)
        places, hashes = places[known], hashes[known]
        places = places[self.hashes[places] == hashes]
        if not len(places):
            return best_rows(np.zeros(len(self.rows), np.float32), k)
        return best_rows(self._scorer.get_scores_from_ids(places), k)


def best_rows(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores, of which none is negative, and their rows: by score descending, then by row ascending."""
    rows = np.flatnonzero(scores > 0)  # several times as fast as of the scores
    if len(rows) > k > 0:
        of_rows = scores[rows]
        rows = rows[of_rows >= np.partition(of_rows, -k)[-k]]
    rows = rows[np.argsort(-scores[rows], kind="stable")[:k]]
    others = np.flatnonzero(scores[:k] == 0) if len(rows) < k else rows[:0]
    rows = np.concatenate([rows, others])[:k]
    return scores[rows], rows


def fuse(dense: Hits, words: Hits, weight: float, k: int) -> torch.Tensor:
    """The ids (b, k) of the best by (1 - weight) / (60 + their rank in `dense`) + weight / (60 + that in `words`).

    A passage adds nothing for a list that it is not in, nor for `words` if it has none of the query's. Ties by id.
    """
    scores = []
    for hits, share in ((dense, 1 - weight), (words, weight)):
        ranks = torch.arange(1, hits.ids.shape[1] + 1, dtype=torch.float64)
        scores.append((share / (RANK_OFFSET + ranks)).expand(hits.ids.shape))
    scores[1] = scores[1] * (words.scores > 0)
    ids, order = torch.cat([dense.ids.cpu(), words.ids], dim=1).sort(dim=1, stable=True)
    fused = torch.cat(scores, dim=1).gather(1, order)
    in_both = ids[:, 1:] == ids[:, :-1]
    fused[:, :-1] += fused[:, 1:] * in_both
    fused[:, 1:].masked_fill_(in_both, -1)
    best = fused.sort(dim=1, descending=True, stable=True).indices[:, :k]  # equal ones stay in the order of their ids
    return ids.gather(1, best).to(dense.ids.device)


def _tokenize(texts: Sequence[str], stopwords: str, *, return_ids: bool = True) -> Any:
    """The words of each text in lower case: two letters or digits at least, and for "en" none of the commonest ones.

    Numbers of words and what they are by bm25s, or lists of words.
    """
    left_out = None if stopwords == "none" else stopwords
    tokenize = partial(import_bm25s().tokenize, stopwords=left_out, return_ids=return_ids, show_progress=False)
    return tokenize([unicodedata.normalize("NFC", text) for text in texts], token_pattern=_word_pattern())


@cache
def _word_pattern() -> str:
    """Runs of letters, digits and the marks on them (accents, vowels of Indic scripts), for `re`."""
    marks = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] == "M")
    marked = rf"(?=[^\0-\xff])[{marks}]+\w*"  # the first part alone would do, but is tried for no ASCII
    return rf"\w(?:\w+|{marked})(?:{marked})*"


def open_word_index(
    passages: JsonlCorpus, settings: config.Index, text: Callable[[dict], str], template: str
) -> WordIndex:
    """Index the words of a corpus, or map what an earlier run has kept of it. Collective.

    The index of a large corpus is kept like all that is derived from files (cache.py): a file for each rank.

    Args:
        text: what is searched of a passage; it follows `template`.

    Raises: DataError at a row that is not a passage.
    """
    rows = distributed.shard_rows(len(passages), distributed.rank(), distributed.world_size())
    how = (template, settings.bm25_k1, settings.bm25_b, settings.bm25_stopwords, import_bm25s().__version__, SPLIT)
    facts = repr((fingerprint_of(passages), titles_joined(passages), how))
    source, kind = passages.sources[0], f"bm25.{rows.start}-{rows.stop}.safetensors"
    is_large = sum(path.stat().st_size for path in passages.paths) >= jsonl.CACHE_FROM
    with open(passages.paths[0], "rb") as file:
        entry = kept(source, file, kind, facts) if is_large else None
        if distributed.any_rank(entry is None):
            tables = _build(passages, settings, text)
            if is_large:
                entry = _keep(partial(cached, source, file, kind, facts=facts), tables)
        if entry is not None:
            with safe_open(entry, "pt") as kept_tables:
                tables = {name: kept_tables.get_tensor(name) for name in TABLES}  # memory-mapped
    return WordIndex(tables, rows, len(passages), settings.bm25_stopwords)


def _keep(into_cache: Callable[[Callable[[Path], object]], Path], tables: dict[str, torch.Tensor]) -> Path | None:
    """The file that holds the tables now; None where it cannot be written."""
    try:
        with distributed.busy():
            return into_cache(partial(save_tensors, tensors=tables))
    except OSError as error:
        log.info("The index of words is not kept for the next run: %s", error)
        return None


class _Counts(NamedTuple):
    """How often which word is in which passage of this rank."""

    hashes: np.ndarray  # (V,) int64, ascending
    lengths: np.ndarray  # (n,) int64, words of each passage
    chunks: list[np.ndarray]  # (3, p) int32: number of the word, row, times; by word, then by row


def _build(passages: JsonlCorpus, settings: config.Index, text: Callable[[dict], str]) -> dict[str, torch.Tensor]:
    """The tables of this rank's rows, as `WordIndex` takes them. Collective. Raises: DataError."""
    started = time.monotonic()
    count = partial(_count, passages, text, settings.bm25_stopwords)
    counts = read_shares("indexing words", len(passages), "passages", count)
    found_in = np.zeros(len(counts.hashes), np.int64)  # passages of this rank that have the word
    for word, _, _ in counts.chunks:
        found_in += np.bincount(word, minlength=len(found_in))
    n, of_all = len(passages), _sum_by_hash(counts.hashes, found_in)
    total = distributed.sum_over_ranks(torch.tensor(counts.lengths.sum())).item()
    idf = np.log(1 + (n - of_all + 0.5) / (of_all + 0.5))
    k1, b = settings.bm25_k1, settings.bm25_b
    norm = k1 * (1 - b + b * counts.lengths * (n / max(1, total)))
    with distributed.busy():
        tables = _invert(counts, found_in, idf, norm)
    size, seconds = sum(table.nbytes for table in tables.values()), time.monotonic() - started
    log.info(
        "Indexed the words of %d passages in %.1f s: %.0f bytes each", len(norm), seconds, size / max(1, len(norm))
    )
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def _count(
    passages: JsonlCorpus,
    text: Callable[[dict], str],
    stopwords: str,
    rows: range,
    read: Callable[[int], object],
) -> _Counts:
    numbers: dict[str, int] = {}  # of words, as they come
    lengths, chunks = [np.zeros(0, np.int64)], []
    for start in range(0, len(rows), CHUNK):
        of_chunk = rows[start : start + CHUNK]
        found = _tokenize([text(passage) for passage in passages[of_chunk.start : of_chunk.stop]], stopwords)
        lengths.append(np.array([len(words) for words in found.ids]))
        row = np.repeat(np.arange(start, start + len(of_chunk)), lengths[-1])
        number = np.array([numbers.setdefault(word, len(numbers)) for word in found.vocab], np.int64)
        word = number[np.fromiter(chain.from_iterable(found.ids), np.int64, len(row))]
        pairs, times = np.unique(word << 32 | row, return_counts=True)
        chunks.append(np.stack([pairs >> 32, pairs & 0xFFFFFFFF, times]).astype(np.int32))
        read(len(of_chunk))
    hashes = np.fromiter(map(hash_id, numbers), np.int64, len(numbers))
    order = np.argsort(hashes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    for chunk in chunks:
        chunk[0] = place[chunk[0]]
    return _Counts(hashes[order], np.concatenate(lengths), chunks)


def _sum_by_hash(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sums (V,) of all ranks' counts (V,) of this rank's words. Collective."""
    of_all, sizes = distributed.all_gather_rows(torch.from_numpy(hashes))
    counts_of_all, _ = distributed.all_gather_rows(torch.from_numpy(counts))
    _, place = np.unique(of_all.numpy(), return_inverse=True)
    first = sum(sizes[: distributed.rank()])
    return np.bincount(place, weights=counts_of_all.numpy())[place[first : first + len(hashes)]]


def _invert(counts: _Counts, found_in: np.ndarray, idf: np.ndarray, norm: np.ndarray) -> dict[str, np.ndarray]:
    """The tables by word, out of the chunks by passage, which are freed one by one.

    Args:
        found_in: (V,) passages of this rank that have the word.
        idf: (V,) how rare the word is.
        norm: (n,) what the number of times is weakened by in the passage.
    """
    starts = np.concatenate([[0], np.cumsum(found_in)])
    rows, weights, end = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32), starts[:-1].copy()
    counts.chunks.reverse()
    while counts.chunks:
        word, row, times = counts.chunks.pop()
        first = np.flatnonzero(np.diff(word, prepend=-1))  # of the neighbours that are pairs of one word
        pairs = np.diff(first, append=len(word))
        at = end[word] + np.arange(len(word)) - np.repeat(first, pairs)
        rows[at], weights[at] = row, idf[word] * times / (times + norm[row])
        end[word[first]] += pairs
    return dict(zip(TABLES, (counts.hashes, starts, rows, weights), strict=True))
