import random
import unicodedata

import pytest
import regex

from atlas.metrics import (
    RECALL_AT,
    accuracy,
    contains_answer,
    exact_match,
    f1,
    normalize_answer,
    retrieval_metrics,
    rouge,
    simple_tokens,
)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a an the", ""),
        ("Theatre, another\tan\n", "theatre another"),
        ("U.S.", "us"),
        ("it's 1,000", "its 1000"),
        ("\u00c9t\u00e9 \u2013 A", "\u00e9t\u00e9 \u2013"),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_the_best_reference():
    assert exact_match("The Paris.", ["London", "paris"]) == 1.0
    assert exact_match("Paris, France", ["paris"]) == 0.0
    assert exact_match("Paris", []) == 0.0


def test_accuracy_normalises_nothing():
    assert accuracy("Paris", ["Rome", "Paris"]) == 1.0
    assert accuracy("paris", ["Paris"]) == 0.0
    assert accuracy("Paris", []) == 0.0


def test_f1_by_hand():
    # 2 of 3 predicted tokens are right, 2 of 4 of the reference's are found: precision 2/3, recall 1/2
    assert f1("the red blue cat", ["red blue dog bird"]) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)  # a token counts as often as both have it
    assert f1("red blue", ["green", "Red", "red, blue!"]) == 1.0
    assert f1("red", ["green"]) == f1("red", []) == f1("", ["red"]) == f1("red", ["the"]) == f1("", [""]) == 0.0


def test_f1_of_raw_tokens():
    assert f1("The Red cat.", ["the red cat"], normalize=None) == 0.0
    assert f1("the red cat", ["the red dog"], normalize=None) == pytest.approx(2 / 3)


def longest_common_subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_by_hand():
    scores = rouge("a b c d", "a c d e f")
    assert list(scores) == ["rouge_1", "rouge_2", "rouge_L"]
    # 3 of 4 and of 5 words; 1 ("c d") of 3 and of 4 pairs; the subsequence "a c d"
    assert scores["rouge_1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert scores["rouge_2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert scores["rouge_L"] == pytest.approx(2 * 3 / (4 + 5))
    assert rouge("A", "a") == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_L": 0.0}  # case-sensitive


@pytest.mark.parametrize(
    "prediction, reference", [("", "a"), (" ", "a"), ("...", "a"), (" . ", "a"), ("a", ""), ("a", ".")]
)
def test_rouge_without_words_is_zero(prediction, reference):
    assert rouge(prediction, reference) == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_L": 0.0}


def test_rouge_of_long_texts():
    rng = random.Random(0)
    words = rng.sample([f"w{i}" for i in range(9000)], 900)
    other = sorted(words)
    expected = longest_common_subsequence(words, other) / 900
    assert rouge(" ".join(words), " ".join(other))["rouge_L"] == pytest.approx(expected)


def has_answer(text, answers):
    return contains_answer(text, [simple_tokens(answer) for answer in answers])


def dpr_has_answer(text, answers):
    """As DPR does it: lists of tokens compared at every position."""

    def tokens(string):
        pattern = regex.compile(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags=regex.IGNORECASE + regex.UNICODE)
        return [match.group().lower() for match in pattern.finditer(unicodedata.normalize("NFD", string))]

    text = tokens(text)
    for answer in filter(None, map(tokens, answers)):
        if any(text[i : i + len(answer)] == answer for i in range(len(text) - len(answer) + 1)):
            return True
    return False


@pytest.mark.parametrize(
    "text, answer, holds",
    [
        ("He was born in New  York.", "new york", True),
        ("He was born in New Yorkshire", "New York", False),
        ("category", "cat", False),
        ("Beyonc\u00e9 sang", "Beyonce\u0301", True),
        ("Beyonc\u00e9 sang", "Beyonce", False),
        ("the U.S. army", "U.S.", True),
        ("the US army", "U.S.", False),
        ("in 1999-2000", "1999", True),
        ("snake_case", "case", True),
        ("\u5317\u4eac", "\u5317", False),
        ("anything", "", False),
        ("anything", " \u200b ", False),
        ("", "x", False),
    ],
)
def test_has_answer(text, answer, holds):
    assert has_answer(text, [answer]) is holds
    assert has_answer(text, ["nowhere to be found", answer]) is holds
    assert dpr_has_answer(text, [answer]) is holds
    assert has_answer(text, []) is False


def test_has_answer_equals_the_plain_version():
    rng = random.Random(0)
    alphabet = [
        "a",
        "b",
        "A",
        " ",
        "  ",
        ".",
        "-",
        "_",
        "1",
        "\u00e9",
        "e\u0301",
        "\u0130",
        "\n",
        "\u00a0",
        "\u200b",
        "\u4eac",
    ]
    results = []
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        answers = ["".join(rng.choices(alphabet, k=rng.randint(0, 3))) for _ in range(rng.randint(0, 2))]
        results.append(has_answer(text, answers))
        assert results[-1] == dpr_has_answer(text, answers), (text, answers)
    assert 100 < sum(results) < 2900


def ranking(length, hits, text="the answer is Rome"):
    return [{"title": "Rome", "text": text if rank in hits else "nothing"} for rank in range(1, length + 1)]


def test_retrieval_metrics():
    assert retrieval_metrics(ranking(20, {6, 9}), ["rome", "Roma"], RECALL_AT[:4]) == {
        "recall@1": 0.0,
        "recall@5": 0.0,
        "recall@10": 1.0,
        "recall@20": 1.0,
        "mrr": 1 / 6,
    }
    assert retrieval_metrics(ranking(3, {2}), ["Rome"], (1, 5)) == {"recall@1": 0.0, "recall@5": 1.0, "mrr": 0.5}
    assert set(retrieval_metrics(ranking(100, {}), ["Rome"]).values()) == {0.0}  # its title is not looked at
    assert list(retrieval_metrics(ranking(100, {}), ["Rome"])) == [
        "recall@1", "recall@5", "recall@10", "recall@20", "recall@50", "recall@100", "mrr"
    ]  # fmt: skip
    assert retrieval_metrics([], ["Rome"], (1,)) == {"recall@1": 0.0, "mrr": 0.0}
    assert retrieval_metrics(ranking(1, {1}), [], (1,)) == {"recall@1": 0.0, "mrr": 0.0}
