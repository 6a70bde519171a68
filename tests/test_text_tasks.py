"""The tasks that learn from plain texts: mlm, lm, section."""

import random
import re
from collections import Counter

import pytest

from atlas.model.tokenization import load_reader_tokenizer
from atlas.tasks import TASKS, example_rng
from atlas.tasks.mlm import _composition
from tests.kit import make_task, read_jsonl, world
from tests.test_every_task import options

METRICS = ("accuracy", "f1", "rouge_1", "rouge_2", "rouge_L")
LINE = {"id": "p1", "title": "Aardvark", "section": "Diet", "text": "The aardvark feeds on ants and termites."}


class Words:
    """A tokenizer whose tokens are words: ids from 10 on in order of appearance, `<extra_id_n>` is 9 - n."""

    pad_id, eos_id = 0, 1

    def __init__(self, sentinels=5):
        self.words = []
        self.sentinel_ids = [9 - n for n in range(sentinels)]

    def encode(self, texts, max_length=None, eos=True):
        rows = [[self.id_of(word) for word in text.split()][:max_length] for text in texts]
        return [row + [self.eos_id] if eos else row for row in rows]

    def id_of(self, word):
        if word == "</s>":
            return self.eos_id
        if found := re.fullmatch(r"<extra_id_(\d)>", word):
            return 9 - int(found[1])
        if word not in self.words:
            self.words.append(word)
        return 10 + self.words.index(word)

    def decode(self, rows, skip_special_tokens=True):
        def text(token):
            return self.words[token - 10] if token >= 10 else f"<extra_id_{9 - token}>" if token > 1 else "</s>"

        return [" ".join(text(t) for t in row if t >= 10 or not skip_special_tokens) for row in rows]


def make(name, **changes):
    options = {
        "tokenizer": Words(),
        "text_maxlength": 200,
        "mlm_noise_density": 0.15,
        "mlm_mean_noise_span_length": 3.0,
        "min_words_per_lm_instance": None,
        "min_lm_context_ratio": 0.5,
        "max_lm_context_ratio": 0.5,
    }
    return make_task(name, **options | changes)


def masked(n, density, mean_length, rng, sentinels=5):
    """Query and target of a text of n different words, as lists."""
    task = make("mlm", tokenizer=Words(sentinels), mlm_noise_density=density, mlm_mean_noise_span_length=mean_length)
    query, target = task.pair({"text": " ".join(f"w{i}" for i in range(n))}, rng)
    return query.split(), target.split()


def spans(words):
    """What stands before, between and behind the sentinels: `a b <0> c` -> [[a, b], [c]]."""
    parts = [[]]
    for word in words:
        if word.startswith("<extra_id_"):
            assert word == f"<extra_id_{len(parts) - 1}>"
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@pytest.mark.parametrize("mean_length", [1.0, 2.5, 3.0, 50.0])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("n", [2, 3, 7, 20, 100])
def test_spans_of_a_text(n, density, mean_length):
    for seed in range(5):
        query, target = masked(n, density, mean_length, random.Random(seed), sentinels=5)
        *kept, behind = spans(query)
        before, *noise = spans(target)
        assert behind == [] and before == [] and len(kept) == len(noise)  # kept, noise, kept, noise, ...
        assert [word for pair in zip(kept, noise, strict=True) for part in pair for word in part] == [
            f"w{i}" for i in range(n)
        ]
        assert all(kept) and all(noise)
        n_noise = min(max(1, round(n * density)), n - 1)
        assert sum(map(len, noise)) == n_noise
        assert len(noise) == min(max(1, round(n_noise / mean_length)), n - n_noise, 5)


def test_a_single_token_is_all_noise():
    assert masked(1, 0.15, 3.0, random.Random(0)) == (["<extra_id_0>"], ["<extra_id_0>", "w0"])


def test_compositions_are_equally_likely():
    rng = random.Random(0)
    counts = Counter(tuple(_composition(6, 3, rng)) for _ in range(5000))
    assert set(counts) == {(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a)}
    assert all(abs(count - 500) < 100 for count in counts.values())
    assert _composition(4, 1, rng) == [4] and _composition(4, 4, rng) == [1] * 4 and _composition(0, 1, rng) == [0]


def test_mlm_cuts_the_text_and_leaves_out_marks_that_stand_in_it():
    words = [f"w{i}" for i in range(30)]
    query, target = make("mlm", text_maxlength=20).pair({"text": " ".join(words)}, random.Random(0))
    assert [w for w in query.split() + target.split() if w[0] == "w" and int(w[1:]) >= 20] == []
    text = "<extra_id_3> w0 w1 </s> w2 <extra_id_0> w3 w4"
    query, target = make("mlm", text_maxlength=20).pair({"text": text}, random.Random(0))
    assert re.findall("<.*?>", query) == re.findall("<.*?>", target) == ["<extra_id_0>"]
    assert sorted(w for w in query.split() + target.split() if w[0] == "w") == [f"w{i}" for i in range(5)]
    assert make("mlm").process(LINE | {"text": "<extra_id_0> </s>"}, random.Random(0)) is None


def test_mlm_example_with_the_tokenizer_of_a_reader():
    tokenizer = load_reader_tokenizer(str(world() / "models/reader"))
    task = make("mlm", tokenizer=tokenizer, mlm_noise_density=0.4, mlm_mean_noise_span_length=1.5)
    line = next(row for row in read_jsonl(world() / "passages.jsonl") if len(row["text"].split()) > 20)
    for seed in range(50):
        example = task.process(line, random.Random(seed))
        assert (example.answers, example.metadata, example.id) == ([example.target], line, line["id"])
        _, *noise = re.split(r"<extra_id_\d+>", example.target)
        filled = example.query
        for n, span in enumerate(noise):
            assert filled.count(f"<extra_id_{n}>") == example.target.count(f"<extra_id_{n}>") == 1
            filled = filled.replace(f"<extra_id_{n}>", span)
        assert filled.strip() == line["text"].strip() and len(noise) > 5
        # what a reader generates that writes the target, token for token
        perfect = tokenizer.decode(tokenizer.encode([example.target], eos=False))[0]
        assert "<extra_id_" not in perfect
        assert task.score(perfect, example) == pytest.approx(dict.fromkeys(METRICS, 1.0), abs=1e-6)
        assert task.score(example.target, example)["accuracy"] == 1.0
        assert task.score("", example) == task.score("...", example) == dict.fromkeys(METRICS, 0.0)


def test_noise_depends_on_seed_epoch_and_line():
    task, text = make("mlm"), " ".join(f"w{i}" for i in range(40))
    drawn = {
        key: task.process(LINE | {"text": text}, example_rng(*key)).query
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len(set(drawn.values())) == 4
    assert task.process(LINE | {"text": text}, example_rng(0, 1, 0)).query == drawn[0, 1, 0]


def test_lm_example():
    task = make("lm")
    example = task.process(LINE | {"text": " One  two\nthree four  five. \n"}, random.Random(0))
    assert (example.query, example.target) == (" One  two", "\nthree four  five.")
    assert (example.answers, example.metadata, example.id) == ([example.target], {"id": "p1"}, "p1")
    assert task.score("three four  five.", example)["accuracy"] == 1.0
    assert task.score("three four five.", example)["accuracy"] == 0.0  # no normalisation
    assert task.score("three four five.", example)["f1"] == 1.0
    assert task.score("Three four five.", example)["f1"] == pytest.approx(2 / 3)  # raw tokens
    assert task.retrieval_answers(example) is None


def test_lm_cuts_everywhere_between_the_ratios():
    words = [f"w{i}" for i in range(20)]
    task = make("lm", min_lm_context_ratio=0.25, max_lm_context_ratio=0.6)
    cuts = Counter()
    for seed in range(2000):
        example = task.process(LINE | {"text": " ".join(words)}, random.Random(seed))
        assert example.query + example.target == " ".join(words)
        cuts[len(example.query.split())] += 1
    assert set(cuts) == set(range(5, 13)) and all(abs(count - 250) < 100 for count in cuts.values())


def test_lm_always_has_a_target():
    example = make("lm").process(LINE | {"text": "word"}, random.Random(0))
    assert (example.query, example.target) == ("", "word")
    task = make("lm", min_lm_context_ratio=1.0, max_lm_context_ratio=1.0)
    assert task.process(LINE | {"text": "one two three"}, random.Random(0)).target == " three"


def test_section_example():
    task = make("section")
    example = task.process(LINE, random.Random(0))
    assert (example.query, example.target) == ("Aardvark, Diet", LINE["text"])
    assert (example.answers, example.metadata, example.id) == ([LINE["text"]], {"id": "p1"}, "p1")
    for without in ({"section": ""}, {"section": " "}, {"section": None}):
        assert task.process(LINE | without, random.Random(0)) is None and not task.check(LINE | without)
    without = {key: value for key, value in LINE.items() if key not in ("section", "title")}
    assert task.process(without, random.Random(0)) is None


@pytest.mark.parametrize("name", ["mlm", "lm", "section"])
def test_texts_that_are_skipped(name):
    task, limited = make(name), make(name, min_words_per_lm_instance=4)
    for text, words in (("", 0), (" \n", 0), ("one", 1), (" one two\tthree ", 3), ("a b c d", 4), ("a b c d e", 5)):
        for a_task, least in ((task, 1), (limited, 4)):
            line = LINE | {"text": text}
            assert (a_task.process(line, random.Random(0)) is not None) == a_task.check(line) == (words >= least)


@pytest.mark.parametrize("name", ["mlm", "lm", "section"])
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"text": None}, "no `text`: expected `id`.*`text` .strings., found id, title, section, text"),
        ({"text": 3}, "`text` must be a string, found 3"),
        ({"id": None}, "no `id`: expected `id`"),
        ({"id": True}, "`id` must be a string, found True"),
        ({"id": ["p"]}, "`id` must be a string"),
    ],
)
def test_bad_lines(name, change, reason):
    task = make(name)
    for read in (task.check, lambda line: task.process(line, random.Random(0))):
        with pytest.raises(ValueError, match=reason):
            read(LINE | change)


def test_bad_lines_of_section():
    for change, reason in (
        ({"section": 3}, "`section` must be a string, found 3"),
        ({"title": None}, "no `title`: expected `id`, `title`, `section` and `text`"),
        ({"title": 3}, "`title` must be a string, found 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            make("section").check(LINE | change)


def test_checking_does_not_tokenize():
    tokenizer = Words()
    task = make("mlm", tokenizer=tokenizer)
    assert task.check(LINE) and tokenizer.words == []
    assert task.process(LINE, random.Random(0)) and tokenizer.words


@pytest.mark.parametrize("name", ["mlm", "lm", "section"])
def test_passages_of_the_line(name):
    given = [{"text": "x"}]
    assert make(name).process(LINE | {"passages": given}, random.Random(0)).passages == given
    strict = make(name, passages_needed=True)
    assert strict.process(LINE | {"passages": given}, random.Random(0)).passages == [{"text": "x", "title": ""}]
    with pytest.raises(ValueError, match="no `passages`"):
        strict.check(LINE)


def test_which_tasks_may_find_their_own_passages():
    filters = {name for name in TASKS if make_task(name, **options()).filters_by_id}
    assert filters == {"cloze", "mlm", "lm", "section"}
