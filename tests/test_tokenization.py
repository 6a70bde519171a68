"""Text to ids: the reader's ids are those the published readers were trained with, recorded in the probes."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

from atlas.model.tokenization import (
    ReaderTokenizer,
    RetrieverTokenizer,
    load_reader_tokenizer,
    load_retriever_tokenizer,
    pad_rows,
)

DATA = Path(__file__).parent / "data"
PROBES = json.loads((DATA / "t5_tokenizer_probes.json").read_text())
SPECIAL = ["<pad>", "</s>", "<unk>"]


@pytest.fixture(scope="module")
def spiece_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("spiece")
    shutil.copy(DATA / "t5_spiece.model", directory / "spiece.model")
    (directory / "config.json").write_text('{"model_type": "t5"}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    return directory


@pytest.fixture(scope="module", params=["spiece.model", "tokenizer.json"])
def reader_tokenizer(request, spiece_directory, tmp_path_factory) -> ReaderTokenizer:
    """From the published file, and from what today's transformers saves of it."""
    if request.param == "spiece.model":
        return load_reader_tokenizer(str(spiece_directory))
    saved = tmp_path_factory.mktemp("saved")
    AutoTokenizer.from_pretrained(spiece_directory).save_pretrained(saved)
    assert not (saved / "spiece.model").exists()
    return load_reader_tokenizer(str(saved))


@pytest.fixture(scope="module")
def retriever_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return directory


@pytest.mark.parametrize("probe", PROBES, ids=[repr(probe["text"]) for probe in PROBES])
def test_probes(reader_tokenizer, probe):
    assert reader_tokenizer.encode([probe["text"]]) == [probe["ids_with_eos"]]
    assert reader_tokenizer.encode([probe["text"]], eos=False) == [probe["ids"]]
    assert reader_tokenizer.decode([probe["ids_with_eos"]], skip_special_tokens=False) == [probe["decoded"]]
    assert reader_tokenizer.decode([probe["ids_with_eos"]]) == [probe["decoded_without_special_tokens"]]


def test_transformers_differs_where_the_probes_matter(spiece_directory):
    """If this fails, transformers tokenizes as published again and `model/tokenization.py` may be simplified."""
    tokenizer = AutoTokenizer.from_pretrained(spiece_directory)
    assert tokenizer(PROBES[0]["text"]).input_ids != PROBES[0]["ids_with_eos"]


def test_vocabulary_layout(reader_tokenizer):
    assert len(reader_tokenizer) == 1000
    assert reader_tokenizer.sentinel_ids == list(range(999, 899, -1))
    assert (reader_tokenizer.pad_id, reader_tokenizer.eos_id) == (0, 1)


def test_cutting_keeps_the_end_token(reader_tokenizer):
    whole = reader_tokenizer.encode([PROBES[0]["text"]])[0]
    for length in range(1, len(whole) + 2):
        expected = whole if length >= len(whole) else whole[: length - 1] + [reader_tokenizer.eos_id]
        assert reader_tokenizer.encode([PROBES[0]["text"]], length) == [expected]
        assert reader_tokenizer.encode([PROBES[0]["text"]], length, eos=False) == [whole[:-1][:length]]


def test_decoding_removes_the_spaces_of_tokenization():
    spaced = "he did n't say : a , b . it 's c ! what ? we 've , I 'm , they 're ' d ' e"
    words = dict.fromkeys([*SPECIAL, "<extra_id_0>", *("▁" + word for word in spaced.split())])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wordwise = ReaderTokenizer(tokenizer)
    assert wordwise.decode(wordwise.encode([spaced], eos=False)) == [
        "he didn't say : a, b. it's c! what? we've, I'm, they're'd'e"
    ]


def test_ids_beyond_the_vocabulary_decode_to_nothing(reader_tokenizer):
    """T5's output layer is larger than its vocabulary (32128 rows for 32100 tokens)."""
    assert reader_tokenizer.decode([[1010, *PROBES[5]["ids"]]]) == [PROBES[5]["decoded_without_special_tokens"]]


def test_tokenizers_go_to_worker_processes(reader_tokenizer, retriever_directory):
    texts = [probe["text"] for probe in PROBES]
    copied = pickle.loads(pickle.dumps(reader_tokenizer))
    assert copied.encode(texts) == reader_tokenizer.encode(texts)
    assert copied.sentinel_ids == reader_tokenizer.sentinel_ids
    retriever_tokenizer = load_retriever_tokenizer(str(retriever_directory))
    assert pickle.loads(pickle.dumps(retriever_tokenizer)).encode(["a b"], 8) == [[2, 5, 6, 3]]


@pytest.mark.processes
def test_importing_is_light():
    code = "import sys, atlas.model.tokenization; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_byte_level_fallback_vocabulary_of_a_bpe_tokenizer_json(tmp_path):
    """A BPE vocabulary with its own pre-tokenizer (single digits) is taken over, with the published spaces."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "1", "2", "ab", "▁ab", "12"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<extra_id_1>", "<extra_id_0>"])}
    merges = [("a", "b"), ("▁", "ab"), ("1", "2")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([*SPECIAL, "<extra_id_1>", "<extra_id_0>"])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_reader_tokenizer(str(tmp_path))
    ids = loaded.encode(["ab  １2é <extra_id_0>"])[0]
    expected = ["▁ab", "▁", "1", "2", "<0xC3>", "<0xA9>", "▁", "<extra_id_0>", "</s>"]
    assert ids == [vocabulary[piece] for piece in expected]
    assert loaded.decode([ids], skip_special_tokens=False) == ["ab 12é <extra_id_0></s>"]
    assert loaded.sentinel_ids == [vocabulary["<extra_id_0>"], vocabulary["<extra_id_1>"]]


@pytest.fixture(scope="module")
def tiny_vocabulary(tmp_path_factory) -> Path:
    """A directory with the spiece.model of a vocabulary of 60 pieces, and transformers' tokenizer.json of it."""
    directory = tmp_path_factory.mktemp("tiny")
    sentences = ["the river of Bako is Selnu", "the bird of Tamlin is Quafim", "who is the founder of Ethgra ?"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(directory / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (directory / "config.json").write_text('{"model_type": "t5"}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("listed", [[], [*SPECIAL], [*SPECIAL, "<extra_id_0>"], None])
def test_sentinels_need_not_be_among_the_added_tokens(tiny_vocabulary, tmp_path, listed):
    """Against sentencepiece, part by part between the sentinels."""
    saved = json.loads((tiny_vocabulary / "tokenizer.json").read_text())
    if listed is not None:
        saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in listed]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    loaded = load_reader_tokenizer(str(tmp_path))
    slow = SentencePieceProcessor(str(tiny_vocabulary / "spiece.model"))
    assert loaded.sentinel_ids == [slow.vocab_size() + 99 - n for n in range(100)] and len(loaded) == len(slow) + 100
    for text in (
        "<extra_id_0>",
        "<extra_id_0> Selnu",
        "<extra_id_0>Selnu",
        "<extra_id_0> the river<extra_id_1> Bako<extra_id_99>",
        "who<extra_id_12>?</s>",
        "the river of Bako",
    ):
        parts = re.split("(<extra_id_[0-9]+>|</s>)", text)
        expected = []
        for part in filter(None, parts):
            if sentinel := re.fullmatch("<extra_id_([0-9]+)>", part):
                expected.append(slow.vocab_size() + 99 - int(sentinel[1]))
            else:
                expected += [slow.eos_id()] if part == "</s>" else slow.encode(part)
        assert loaded.encode([text], eos=False) == [expected], text
    published = AutoTokenizer.from_pretrained(tiny_vocabulary)
    for text in ("<extra_id_0> Selnu", "<extra_id_0> the bird<extra_id_1> is"):
        assert loaded.encode([text]) == [published(text).input_ids]


def test_retriever_tokens(retriever_directory):
    tokenizer = load_retriever_tokenizer(str(retriever_directory))
    slow = BertTokenizer.from_pretrained(retriever_directory)
    texts = ["", "A bc zz", "a b a b a b a b"]
    for length in (3, 5, 512):
        assert tokenizer.encode(texts, length) == slow(texts, truncation=True, max_length=length)["input_ids"]
    assert isinstance(tokenizer, RetrieverTokenizer)
    assert tokenizer.pad_id == 0


def test_saved_truncation_and_padding_are_switched_off(retriever_directory, tmp_path):
    saved = AutoTokenizer.from_pretrained(retriever_directory)
    saved.backend_tokenizer.enable_truncation(3)
    saved.backend_tokenizer.enable_padding(length=4)
    saved.save_pretrained(tmp_path)
    assert load_retriever_tokenizer(str(tmp_path)).encode(["a b a b", "a"]) == [[2, 5, 6, 5, 6, 3], [2, 5, 3]]


def test_pad_rows():
    ids, mask = pad_rows([[5, 6, 7], [], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert pad_rows([[1] * 9], 0, multiple=8)[0].shape == (1, 16)
    assert pad_rows([[1] * 8], 0, multiple=8)[0].shape == (1, 8)
    assert pad_rows([[]], 0)[0].tolist() == [[0]]
    assert pad_rows([], 0, multiple=4)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("load", "flag"), [(load_reader_tokenizer, "--reader_model_type"), (load_retriever_tokenizer, "--retriever_model_")]
)
def test_what_cannot_be_loaded_is_named(load, flag, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "absent"), "owner/no-such-model"):
        with pytest.raises(OSError, match=f"{flag}.*{name}") as raised:
            load(name)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("spiece.model", b"\xff not a model", "not a sentencepiece model"),
        ("tokenizer.json", b"{", "cannot load a T5 tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": 1}}', "damaged"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [1, [2, 3]]}}', "damaged"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [[2, 3], [[4], 5]]}}', "damaged"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0]]}}', "no <pad>"),
    ],
)
def test_damaged_tokenizer_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=reason):
        load_reader_tokenizer(str(tmp_path))
