"""Tiny models for the demo: layout of the tokenizers, ordinary directories, starts that work, pretraining that runs."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertModel, T5ForConditionalGeneration

from preprocessing import make_tiny_models as tiny
from src.tokenization import load_reader_tokenizer, load_retriever_tokenizer

SYLLABLES = ["ba", "ko", "ri", "nu", "sel", "tam", "vor", "eth", "lin", "gra", "dus", "mon"]


def made_up_data(n: int = 120) -> tuple[list[dict], list[dict]]:
    """Passages about towns, and clozes about them."""
    rng = random.Random(0)
    names = ["".join(rng.sample(SYLLABLES, 3)).capitalize() for _ in range(2 * n)]
    passages, clozes = [], []
    for i in range(n):
        town, river = names[i], names[n + i]
        wordings = (f"The river of {town} is {river}.", f"{town} lies on the river {river}.")
        ids = [f"town-{i}-river-{wording}" for wording in (0, 1)]
        passages += [
            {"id": identifier, "title": town, "section": "River", "text": text}
            for identifier, text in zip(ids, wordings, strict=True)
        ]
        clozes += [
            {
                "id": f"town-{i}-river-cloze-{j}",
                "query": query,
                "answer": river,
                "passages": ids,
                "relation": "town.river",
            }
            for j, query in enumerate((f"The river of {town} is <extra_id_0>.", f"{town}. river: <extra_id_0>"))
        ]
    return passages, clozes


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{row['title']}: {row['section']} {row['text']}" for row in made_up_data()[0]]


@pytest.fixture(scope="module")
def models(texts, tmp_path_factory) -> tuple[Path, Path]:
    return tiny.build_tiny_models(texts, tmp_path_factory.mktemp("models"))


def test_reader_tokenizer_has_the_layout_of_t5(models):
    tokenizer = Tokenizer.from_file(str(models[0] / "tokenizer.json"))
    last = tokenizer.get_vocab_size() - 1
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(100)] == list(range(last, last - 100, -1))
    tokens = tokenizer.encode("question: of answer: <extra_id_0>").tokens
    assert tokens[-3:] == ["▁", "<extra_id_0>", "</s>"]


def test_the_projects_tokenizers_give_the_same_ids(models, texts):
    reader, retriever = load_reader_tokenizer(str(models[0])), load_retriever_tokenizer(str(models[1]))
    prompts = [f"{tiny.QUERY_FORMAT.format(query=text)}  title: context: {text} " for text in texts[:20]]
    here = [Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in models]
    assert reader.encode(prompts) == [encoding.ids for encoding in here[0].encode_batch(prompts)]
    assert retriever.encode(prompts) == [encoding.ids for encoding in here[1].encode_batch(prompts)]
    assert reader.decode(reader.encode(texts[:5])) == texts[:5]


def test_an_answer_has_the_same_pieces_in_a_sentence_and_alone(models, texts):
    tokenizer = Tokenizer.from_file(str(models[0] / "tokenizer.json"))
    for row in made_up_data()[1]:
        alone = tokenizer.encode(row["answer"], add_special_tokens=False).ids
        inside = tokenizer.encode(f"is {row['answer']}.", add_special_tokens=False).ids
        assert inside[1:-1] == alone


def test_retriever_tokenizer_knows_every_word(models, texts):
    tokenizer = Tokenizer.from_file(str(models[1] / "tokenizer.json"))
    assert not any("[UNK]" in encoding.tokens for encoding in tokenizer.encode_batch(texts + [tiny.PROMPT_WORDS]))


def test_models_load_as_usual(models):
    reader = T5ForConditionalGeneration.from_pretrained(models[0])
    retriever = BertModel.from_pretrained(models[1], add_pooling_layer=False)
    assert reader.config.vocab_size == len(AutoTokenizer.from_pretrained(models[0]))
    assert retriever.config.vocab_size == len(AutoTokenizer.from_pretrained(models[1]))
    assert retriever.config.pooling == "average" and retriever.config.max_position_embeddings == 512


def test_the_same_seed_gives_the_same_files(models, texts, tmp_path):
    again = tiny.build_tiny_models(texts, tmp_path)
    for first, second in zip(models, again, strict=True):
        for name in ("tokenizer.json", "model.safetensors", "config.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


def test_lexical_start_finds_passages_by_rare_words(models, texts):
    retriever = BertModel.from_pretrained(models[1], add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(models[1] / "tokenizer.json"))
    names = [row["title"] for row in made_up_data()[0]]
    passages = tiny.embed_texts(retriever, tokenizer, texts)
    queries = tiny.embed_texts(retriever, tokenizer, [f"question: What is the river of {name}?" for name in names])
    found = (queries @ passages.T).topk(2).indices.tolist()
    right = [any(names[i] == name for i in row) for row, name in zip(found, names, strict=True)]
    assert sum(right) > 0.8 * len(right)


def test_embedding_in_batches_equals_one_text_at_a_time(models, texts):
    retriever = BertModel.from_pretrained(models[1], add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(models[1] / "tokenizer.json"))
    some = [texts[0], " ".join(texts[:4]), texts[2]]
    expected = []
    for text in some:
        ids = torch.tensor([tokenizer.encode(text).ids])
        expected.append(retriever(input_ids=ids).last_hidden_state[0].mean(0))
    torch.testing.assert_close(
        tiny.embed_texts(retriever, tokenizer, some, 2), torch.stack(expected), atol=1e-5, rtol=0
    )


def test_single_kernels_compute_the_same(models):
    reader = T5ForConditionalGeneration.from_pretrained(models[0]).eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    labels = ids[:, :5].clone()
    names = list(reader.state_dict())
    before = reader(input_ids=ids, labels=labels).logits
    tiny.use_single_kernels(reader)
    assert any(isinstance(module, torch.nn.RMSNorm) for module in reader.modules())
    torch.testing.assert_close(reader(input_ids=ids, labels=labels).logits, before)
    assert list(reader.state_dict()) == names


@pytest.fixture
def data_directory(tmp_path) -> Path:
    passages, clozes = made_up_data()
    held_out = [{"id": row["id"]} for row in passages if int(row["id"].split("-")[1]) >= 100]
    clozes = [row for row in clozes if int(row["id"].split("-")[1]) < 100]
    for name, rows in {"passages": passages, "pretrain": clozes, "held_out": held_out}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_held_out_passages_are_not_read(data_directory):
    data = tiny.PretrainingData.read(data_directory)
    assert {int(i.split("-")[1]) for i in data.passages} == set(range(100))
    assert {i for cloze in data.clozes for i in cloze["passages"]} <= set(data.passages)


def test_missing_data_is_named_with_the_remedy(tmp_path):
    with pytest.raises(SystemExit, match=r"held_out.jsonl is missing; write it with: .*prepare_demo"):
        tiny.PretrainingData.read(tmp_path)


def test_distractors_do_not_hold_the_answer(data_directory, models):
    data = tiny.PretrainingData.read(data_directory)
    retriever = BertModel.from_pretrained(models[1], add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(models[1] / "tokenizer.json"))
    distractors = tiny.choose_distractors(retriever, tokenizer, data, data.clozes, 3, seed=0)
    for cloze, ids in zip(data.clozes, distractors, strict=True):
        assert len(ids) == 3
        assert not any(cloze["answer"] in data.passages[i].text for i in ids)


def test_each_example_of_a_reader_batch_holds_its_answer(data_directory):
    data = tiny.PretrainingData.read(data_directory)
    distractors = [[i for i in data.passages if i not in cloze["passages"]][:2] for cloze in data.clozes]
    batches = tiny.reader_batches(data, data.clozes, distractors, batch_size=16, seed=0)
    for inputs, targets in batches:
        assert len(inputs) == 3 * len(targets)
        for i, target in enumerate(targets):
            answer = target.removeprefix("<extra_id_0> ")
            assert any(f" {answer}." in text for text in inputs[3 * i : 3 * i + 3])
    assert sum(len(targets) for _, targets in batches) == len(data.clozes)


def test_pretraining_learns_and_saves(data_directory, tmp_path, monkeypatch, capsys):
    for name, value in {
        "READER_VOCABULARY": 600,
        "RETRIEVER_VOCABULARY": 600,
        "READER_WIDTH": 32,
        "RETRIEVER_WIDTH": 64,
        "RETRIEVER_STEPS_PER_MINUTE": 10,
        "READER_PHASES": (tiny.ReaderPhase(80, 16, 1), tiny.ReaderPhase(20, 4, 3)),
    }.items():
        monkeypatch.setattr(tiny, name, value)
    tiny.pretrain(tiny.PretrainingData.read(data_directory), tmp_path / "models", minutes=1, seed=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reader")]
    losses = [float(line.split("loss: ")[1].split()[0]) for line in lines]
    assert losses[-1] < 0.9 * losses[0]
    reader = T5ForConditionalGeneration.from_pretrained(tmp_path / "models/reader")
    assert "encoder.block.0.layer.0.layer_norm.weight" in reader.state_dict()
    BertModel.from_pretrained(tmp_path / "models/retriever", add_pooling_layer=False)
