"""Each gold-score mode teaches a retriever that knows nothing, by a reader that has learnt to copy."""

import random
import re

import pytest

from make_tiny_models import build_tiny_models
from tests.kit import SYLLABLES, last_metrics, run, write_jsonl

KINDS = ("river", "bird", "founder")
WORDINGS = ("what is the {kind} of {town}?", "which {kind} does {town} have?")
OTHER_WORDING = "name the {kind} of {town}."
N_TOWNS = 24
STEPS = 200


def names(rng, n):
    found = set()
    while len(found) < n:
        found.add("".join(rng.choices(SYLLABLES, k=3)).capitalize())
    return rng.sample(sorted(found), n)


def passage(town, kind, fact):
    """The reader is shown the title, the retriever is not: nothing in a text says which question it answers."""
    return {"id": f"{town}-{kind}", "title": town, "text": f"The {kind} here is {fact}."}


def question(wording, town, kind, fact):
    return {"question": wording.format(kind=kind, town=town), "answers": [fact]}


def copying_lesson(rng, towns, facts):
    """A question with four passages, one of which answers it: towns and facts are thrown together anew every time."""
    rows = zip(rng.sample(towns, 4), rng.choices(KINDS, k=4), rng.sample(facts, 4), strict=True)
    passages = [passage(*row) for row in rows]
    right = rng.choice(passages)
    kind, fact = re.fullmatch(r"The (\w+) here is (\w+)\.", right["text"]).groups()
    asked = question(rng.choice([*WORDINGS, OTHER_WORDING]), right["title"], kind, fact)
    return asked | {"passages": passages}


def in_other_words(lesson):
    """The same lesson, in sentences that the reader has not learnt to read."""
    for each in lesson["passages"]:
        kind, fact = re.fullmatch(r"The (\w+) here is (\w+)\.", each["text"]).groups()
        each["text"] = f"Here, {fact} is the {kind}."
    return lesson


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A corpus with questions, an untrained retriever, and a reader that has learnt to copy, from other towns."""
    home, rng = tmp_path_factory.mktemp("school"), random.Random(0)
    towns, facts = names(rng, 400), names(rng, 400)
    known = [(towns.pop(), rng.choice(KINDS), facts.pop()) for _ in range(N_TOWNS)]
    corpus = [passage(*row) for row in known]
    lessons = [copying_lesson(rng, towns, facts) for _ in range(3000)]
    write_jsonl(home / "passages.jsonl", corpus)
    write_jsonl(home / "train.jsonl", [question(wording, *row) for wording in WORDINGS for row in known])
    write_jsonl(home / "test.jsonl", [question(OTHER_WORDING, *row) for row in known])
    write_jsonl(home / "lessons.jsonl", lessons[100:])
    write_jsonl(home / "exam.jsonl", lessons[:100])
    other = [in_other_words(copying_lesson(rng, towns, facts)) for _ in range(60 * 16 + 400)]
    write_jsonl(home / "other_lessons.jsonl", other[400:])
    write_jsonl(home / "other_exam.jsonl", other[:400])
    texts = [f"{p['title']} {p['text']}" for row in [{"passages": corpus}, *lessons[:300]] for p in row["passages"]]
    texts += [row["question"] for row in lessons[:300]]
    build_tiny_models(texts, home / "models", vocabulary_size=300)
    reader = run(
        home,
        name="reader",
        reader_model_type=home / "models/reader",
        train_data=home / "lessons.jsonl",
        eval_data=home / "exam.jsonl",
        passages=None,
        use_file_passages=True,
        per_gpu_batch_size=32,
        total_steps=300,
        scheduler="linear",
        warmup_steps=20,
        lr=3e-3,
        write_results=False,
        log_freq=100,
    )
    assert last_metrics(reader)["exact_match"] > 50  # always taking the same one of the four passages gives 25
    return home


def train_in(school, name, program="train", **flags):
    """recall@1 of the questions in another wording than the trained ones.

    All passages are retrieved, so that the reader judges the right one every time, wherever the untrained retriever
    ranks it. If it only saw the best 12, it would never see that of some questions, would learn their answers by heart,
    and the bound would be met by luck. EMDR² would not come back from there: its gradient for a passage is in
    proportion to the share that the retriever gives it.
    """
    directory = run(
        school,
        program,
        name=name,
        model_path=flags.pop("model_path", school / "reader"),
        reader_model_type=school / "models/reader",
        retriever_model_path=school / "models/retriever",
        retriever_format="{text}",
        passages=school / "passages.jsonl",
        train_data=school / "train.jsonl",
        eval_data=school / "test.jsonl",
        shuffle=True,
        per_gpu_batch_size=8,
        n_context=4,
        retriever_n_context=N_TOWNS,
        total_steps=flags.pop("total_steps", STEPS),
        lr=1e-4,
        lr_retriever=1e-3,
        write_results=False,
        log_freq=100,
        **flags,
    )
    return last_metrics(directory)["recall@1"]


# the tiny reader's attention scores differ by some thousandths, its mean log-likelihoods by some units
TEMPERATURES = {"pdist": 0.1, "adist": 0.001, "loop": 0.1, "emdr": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("mode", TEMPERATURES)
def test_the_retriever_learns_from_the_reader(school, mode):
    settings = {"gold_score_mode": mode, "temperature_gold": TEMPERATURES[mode]}
    learnt = train_in(school, mode, train_retriever=True, query_side_retriever_training=True, **settings)
    assert learnt >= 80


@pytest.mark.slow
def test_a_tied_retriever_learns_with_refreshes(school):
    assert train_in(school, "tied", train_retriever=True, gold_score_mode="pdist", refresh_index=20) >= 80


@pytest.mark.slow
def test_a_frozen_retriever_does_not_learn(school):
    """It finds hardly more than chance (4 %) at the start, and that does not change unless it is trained."""
    start = train_in(school, "start", program="evaluate", model_path="none")  # any reader will do
    assert start <= 10
    assert train_in(school, "untrained", total_steps=20) == start
    waiting = {"train_retriever": True, "freeze_retriever_steps": 20, "weight_decay": 0}
    assert train_in(school, "waiting", total_steps=20, **waiting) == start


# Chosen with seed 7; the seeds of the test are others.
WAYS = {"full": {"lr": 1e-3}, "lora": {"lr": 5e-3, "lora_rank": 16}, "8 bits": {"lr": 1e-3, "optimizer": "adamw8bit"}}


def read_in_other_words(school, name, program="train", **flags):
    """Exact match, of questions on sentences that the reader has not learnt to read."""
    directory = run(
        school,
        program,
        name=name,
        model_path=school / "reader",
        reader_model_type=school / "models/reader",
        train_data=school / "other_lessons.jsonl" if program == "train" else None,
        eval_data=school / "other_exam.jsonl",
        passages=None,
        use_file_passages=True,
        shuffle=True,
        per_gpu_batch_size=16,
        per_gpu_eval_batch_size=20,
        total_steps=60,
        scheduler="linear",
        warmup_steps=5,
        write_results=False,
        log_freq=60,
        **flags,
    )
    return last_metrics(directory)["exact_match"]


@pytest.mark.slow
def test_adapters_and_moments_in_8_bits_learn_as_much(school):
    """In 60 steps. Means of three seeds: LoRA within 2 points of exact match of full fine-tuning, 8 bits within 1."""
    assert read_in_other_words(school, "other-before", "evaluate") < 20
    learnt = {
        way: sum(read_in_other_words(school, f"{way}-{seed}", seed=seed, **flags) for seed in (0, 1, 2)) / 3
        for way, flags in WAYS.items()
    }
    assert learnt["full"] > 80
    assert learnt["lora"] > learnt["full"] - 2
    assert abs(learnt["8 bits"] - learnt["full"]) < 1
