"""Metrics of one example, from 0 to 1. Averages and percentages are up to the caller."""

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import regex  # knows Unicode categories, which `re` does not

RECALL_AT = (1, 5, 10, 20, 50, 100)
NO_PERCENTAGES = ("eval_loss", "mrr", "judged_mrr")
SPELLINGS = {"f1": "F1", "mrr": "MRR", "rouge": "ROUGE", "ndcg": "nDCG"}
VERDICTS = {"true", "false"}  # answers that no passage is searched for
# The simple tokenizer of DrQA and DPR: runs of letters, digits and marks, or one other visible character.
SIMPLE_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def spoken(name: str) -> str:
    """A metric's name as one says it: `exact_match` is the exact match, `judged_ndcg@10` the judged nDCG@10."""
    said = name.removeprefix("eval_").replace("_", " ")
    for plain, spelling in SPELLINGS.items():
        said = re.sub(rf"\b{plain}\b", spelling, said)
    return said


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references, character for character."""
    return float(prediction in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the normalised references."""
    prediction = normalize_answer(prediction)
    return float(any(prediction == normalize_answer(reference) for reference in references))


def f1(prediction: str, references: Sequence[str], normalize: Callable[[str], str] | None = normalize_answer) -> float:
    """Token F1 with the best of the references, as in SQuAD v1.1; `normalize=None` compares raw tokens."""

    def tokens(text: str) -> list[str]:
        return (normalize(text) if normalize else text).split()

    predicted, best = tokens(prediction), 0.0
    for reference in map(tokens, references):
        common = (Counter(predicted) & Counter(reference)).total()
        if common:
            best = max(best, 2 * common / (len(predicted) + len(reference)))
    return best


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """The F scores rouge_1, rouge_2, rouge_L of the PyPI package `rouge`, case-sensitive; 0 if a text has no words."""
    import rouge as package

    names = {"rouge-1": "rouge_1", "rouge-2": "rouge_2", "rouge-l": "rouge_L"}
    if not prediction.replace(".", "").strip() or not reference.replace(".", "").strip():
        return dict.fromkeys(names.values(), 0.0)
    limit = sys.getrecursionlimit()
    # The package finds the longest common subsequence by recursion, one level per word.
    sys.setrecursionlimit(limit + len(prediction.split()) + len(reference.split()))
    try:
        scores = package.Rouge().get_scores(prediction, reference)[0]
    finally:
        sys.setrecursionlimit(limit)
    return {name: scores[key]["f"] for key, name in names.items()}


def simple_tokens(text: str) -> str:
    """Lower-case simple tokens with a space on either side of each, so that `in` compares whole tokens."""
    return f" {' '.join(SIMPLE_TOKEN.findall(unicodedata.normalize('NFD', text)))} ".lower()


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether the text contains the tokens of an answer one after the other (Karpukhin et al. 2020, DPR).

    Args:
        answers: the results of `simple_tokens`; an answer without tokens is never found.
    """
    tokens = simple_tokens(text)
    return any(answer in tokens for answer in answers if answer.strip())


def retrieval_metrics(
    passages: Sequence[dict], answers: Sequence[str], at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """`recall@k` for each k of `at`, and `mrr`, of one ranked list, which may be shorter.

    recall@k is 1 if one of the first k passages contains an answer; mrr is 1 / rank of the first that does, 0 if none
    does. Only a passage's `text` counts, not its title.
    """
    answers = [simple_tokens(answer) for answer in answers]
    ranks = (rank for rank, passage in enumerate(passages, 1) if contains_answer(passage["text"], answers))
    first = next(ranks, None)
    metrics = {f"recall@{k}": float(first is not None and first <= k) for k in at}
    return metrics | {"mrr": 1 / first if first else 0.0}


def ndcg(relevances: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """nDCG@k (Järvelin and Kekäläinen 2002) with trec_eval's gain and discount; 0 if nothing in `ideal` is relevant.

    `relevances` are those of the retrieved passages by rank; `ideal` are those of all passages that could be retrieved.
    """

    def dcg(gains: Sequence[int]) -> float:
        return sum(max(gain, 0) / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], 1))

    best = dcg(sorted(ideal, reverse=True))
    return dcg(relevances) / best if best else 0.0


def ranking_metrics(
    relevances: Sequence[int], ideal: Sequence[int], to_find: int, at: Sequence[int]
) -> dict[str, float]:
    """`recall@k` and `ndcg@k` for each k of `at`, and `mrr`, with `relevances` and `ideal` as for `ndcg`.

    recall@k is the share of `to_find` relevant passages; if more are retrieved, it is 1.
    """
    first = next((rank for rank, relevance in enumerate(relevances, 1) if relevance > 0), None)
    relevant = {k: sum(relevance > 0 for relevance in relevances[:k]) for k in at}
    return (
        {f"recall@{k}": min(relevant[k], to_find) / to_find for k in at}
        | {f"ndcg@{k}": ndcg(relevances, ideal, k) for k in at}
        | {"mrr": 1 / first if first else 0.0}
    )


def judged_metrics(identifiers: Sequence[str], judged: Mapping[str, int], at: Sequence[int]) -> dict[str, float]:
    """The `ranking_metrics` of one ranked list by judgements, as trec_eval has them; none without a relevant passage.

    Args:
        identifiers: what was retrieved, best first; what is there twice counts where it is first.
        judged: identifier -> relevance, relevant above 0; what is not in it is not relevant.
    """
    to_find = sum(relevance > 0 for relevance in judged.values())
    if not to_find:
        return {}
    relevances = [judged.get(identifier, 0) for identifier in dict.fromkeys(identifiers)]
    return ranking_metrics(relevances, list(judged.values()), to_find, at)
