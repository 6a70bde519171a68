"""Tiny models for the demo: layout of the tokenizers, ordinary directories, starts that work."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertModel, T5ForConditionalGeneration

import make_tiny_models as tiny
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer
from tests.kit import write_jsonl

SYLLABLES = ["ba", "ko", "ri", "nu", "sel", "tam", "vor", "eth", "lin", "gra", "dus", "mon"]


def made_up_data(n: int = 120) -> tuple[list[dict], list[str]]:
    """Passages about towns, and the rivers they are on."""
    rng = random.Random(0)
    names = ["".join(rng.sample(SYLLABLES, 3)).capitalize() for _ in range(2 * n)]
    passages = []
    for i in range(n):
        town, river = names[i], names[n + i]
        wordings = (f"The river of {town} is {river}.", f"{town} lies on the river {river}.")
        passages += [
            {"id": f"town-{i}-river-{wording}", "title": town, "section": "River", "text": text}
            for wording, text in enumerate(wordings)
        ]
    return passages, names[n:]


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
    prompts = [f"question: {text} answer: <extra_id_0>  title: context: {text} " for text in texts[:20]]
    here = [Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in models]
    assert reader.encode(prompts) == [encoding.ids for encoding in here[0].encode_batch(prompts)]
    assert retriever.encode(prompts) == [encoding.ids for encoding in here[1].encode_batch(prompts)]
    assert reader.decode(reader.encode(texts[:5])) == texts[:5]


def test_an_answer_has_the_same_pieces_in_a_sentence_and_alone(models, texts):
    tokenizer = Tokenizer.from_file(str(models[0] / "tokenizer.json"))
    for river in made_up_data()[1]:
        alone = tokenizer.encode(river, add_special_tokens=False).ids
        inside = tokenizer.encode(f"is {river}.", add_special_tokens=False).ids
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


def embed(retriever: BertModel, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean of the hidden states, one text at a time."""
    ids = [torch.tensor([encoding.ids]) for encoding in tokenizer.encode_batch(texts)]
    with torch.no_grad():
        return torch.stack([retriever(input_ids=row).last_hidden_state[0].mean(0) for row in ids])


def test_lexical_start_finds_passages_by_rare_words(models, texts):
    retriever = BertModel.from_pretrained(models[1], add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(models[1] / "tokenizer.json"))
    names = [row["title"] for row in made_up_data()[0]]
    passages = embed(retriever, tokenizer, texts)
    queries = embed(retriever, tokenizer, [f"question: What is the river of {name}?" for name in names])
    found = (queries @ passages.T).topk(2).indices.tolist()
    right = [any(names[i] == name for i in row) for row, name in zip(found, names, strict=True)]
    assert sum(right) > 0.8 * len(right)


def test_a_missing_corpus_is_named_with_the_remedy(tmp_path):
    with pytest.raises(SystemExit, match=r"passages.jsonl does not exist; create it with: .*prepare_demo"):
        tiny.read_texts(tmp_path / "passages.jsonl")


def test_texts_are_those_of_any_corpus(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": "1", "title": "T", "text": "a\u2028b"}])
    assert tiny.read_texts(corpus) == ["T:  a\u2028b"]


def test_the_command_builds_models_of_a_corpus(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "passages.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in made_up_data()[0]))
    output = tmp_path / "models"
    monkeypatch.setattr(
        sys, "argv", ["make_tiny_models.py", "--passages", str(corpus), "--output_directory", str(output)]
    )
    tiny.main()
    assert capsys.readouterr().out.split() == [str(output / "reader"), str(output / "retriever")]
    reader = T5ForConditionalGeneration.from_pretrained(output / "reader")
    retriever = BertModel.from_pretrained(output / "retriever", add_pooling_layer=False)
    assert sum(weight.numel() for model in (reader, retriever) for weight in model.parameters()) < 4_000_000
