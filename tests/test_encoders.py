"""Encoders other than Contriever: pooling, unit length and prefixes from config, flags, checkpoint or modules.json."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, BertModel

from atlas.checkpoint import load_checkpoint
from atlas.config import Model
from atlas.index.passages import open_passages
from atlas.model.inputs import Inputs
from atlas.model.retriever import SETTINGS, fingerprint, load_retriever
from atlas.model.tokenization import load_retriever_tokenizer
from tests.kit import logged, read_jsonl, run, world

MINILM = {"pooling": "average", "normalize": True}
E5 = {**MINILM, "query_prefix": "query: ", "passage_prefix": "passage: "}
BGE = {"pooling": "cls", "normalize": True, "query_prefix": "Represent this sentence for searching: "}
SQRT = {"pooling": "sqrt", "passage_prefix": "the month "}
ENCODERS = pytest.mark.parametrize("settings", [MINILM, E5, BGE, SQRT], ids=["minilm", "e5", "bge", "sqrt"])
EVALUATION = {"train_data": None, "retrieve_only": True, "reader_model_type": None}


def encoder(directory, **settings):
    """The tiny retriever with random weights in every part, its config with these keys of ours and no others."""
    shutil.copytree(world() / "models/retriever", directory)
    torch.manual_seed(0)
    bert = BertModel.from_pretrained(directory, add_pooling_layer=False)
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    bert.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key not in SETTINGS}
    (directory / "config.json").write_text(json.dumps(plain | settings))
    return directory


def sentence_transformer(
    directory, pooling, modules=("Transformer", "Pooling", "Normalize"), prompts=None, settings=None
):
    """The same as sentence-transformers saves it, with this pooling config."""
    encoder(directory, **(settings or {}))
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    for entry in entries[1:]:
        (directory / entry["path"]).mkdir()
    if pooling is not None:
        (directory / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 128} | pooling))
    if prompts is not None:
        (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return directory


def corpus_of_the_world():
    return open_passages(world() / "passages.jsonl")[:]


def flags(settings):
    return {f"retriever_{key}": value for key, value in settings.items()}


def settings_of(directory, **overrides):
    config = load_retriever(str(directory), query_side=False, dropout=None, overrides=overrides).contriever.config
    return {key: getattr(config, key) for key in SETTINGS}


def embed_plainly(path, texts, pooling="average", normalize=False, prefix=""):
    """transformers alone, one text at a time: (n, D)."""
    bert, tokenizer = BertModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    rows = []
    for text in texts:
        ids = tokenizer(prefix + text, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = bert(input_ids=ids)[0][0]
        row = {"average": hidden.mean(0), "sqrt": hidden.sum(0) / len(hidden) ** 0.5, "cls": hidden[0]}[pooling]
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows)


def plain_sides(path, queries, passages, query_prefix="", passage_prefix="", **pooling):
    return (
        embed_plainly(path, queries, prefix=query_prefix, **pooling),
        embed_plainly(path, [f"{p['title']} {p['text']}" for p in passages], prefix=passage_prefix, **pooling),
    )


@ENCODERS
@pytest.mark.parametrize("query_side", [False, True])
def test_embeddings_are_those_of_plain_transformers(tmp_path, settings, query_side):
    path = str(encoder(tmp_path / "encoder", **settings))
    retriever = load_retriever(path, query_side=query_side, dropout=None)
    tokenizer = load_retriever_tokenizer(path)
    inputs = Inputs(Model(text_maxlength=64), None, tokenizer, device=torch.device("cpu"), retriever=retriever)
    queries = [row["question"] for row in read_jsonl(world() / "dev.jsonl")] + [""]
    passages = corpus_of_the_world()[:30]
    passages[3]["text"] *= 40  # is cut, prefix included
    expected = plain_sides(path, queries, passages, **settings)
    with torch.no_grad():
        assert_close(retriever.embed_queries(*inputs.queries(queries)), expected[0], atol=2e-6, rtol=1e-4)
        assert_close(retriever.embed_passages(*inputs.passages(passages)), expected[1], atol=2e-6, rtol=1e-4)


@ENCODERS
def test_whole_runs_find_what_plain_transformers_find(tmp_path, settings):
    """From the config, from flags, and from a checkpoint that was made with the flags: the same passages."""
    path = encoder(tmp_path / "encoder", **settings)
    found = run(tmp_path, "evaluate", name="config", retriever_model_path=path, **EVALUATION)
    rows = read_jsonl(found / "dev-step-0.jsonl")
    passages = corpus_of_the_world()
    queries, corpus = plain_sides(str(path), [row["query"] for row in rows], passages, **settings)
    best = (queries @ corpus.T).topk(4).values
    scores = torch.tensor([[passage["score"] for passage in row["passages"]] for row in rows])
    assert_close(scores, best, atol=2e-3, rtol=2e-3)

    said = flags(settings) | {"retriever_model_path": encoder(tmp_path / "plain")}
    other = run(tmp_path, "evaluate", name="flags", **said, **EVALUATION)
    assert read_jsonl(other / "dev-step-0.jsonl") == rows

    trained = run(tmp_path, name="trained", total_steps=1, lr=0, lr_retriever=0, eval_data=None, **said)
    kept = load_checkpoint(trained).retriever_config
    assert {key: kept[key] for key in SETTINGS} == SETTINGS | settings
    plain = {"retriever_model_path": tmp_path / "plain"}
    again = run(tmp_path, "evaluate", name="again", model_path=trained, **plain, **EVALUATION)
    assert read_jsonl(again / "dev-step-0.jsonl") == rows


def test_a_flag_wins_over_the_checkpoint_and_the_checkpoint_over_the_directory(tmp_path):
    path = encoder(tmp_path / "encoder", **E5)
    trained = run(
        tmp_path, name="trained", total_steps=1, eval_data=None, retriever_model_path=path, **flags(BGE), lr_retriever=0
    )
    kept = load_checkpoint(trained).retriever_config
    assert {key: kept[key] for key in SETTINGS} == SETTINGS | E5 | BGE
    changed = {"retriever_normalize": False, "retriever_query_prefix": "", "retriever_pooling": "average"}
    for name, more, expected in (
        ("flags", changed, {"passage_prefix": "passage: "}),
        ("none", {}, E5 | BGE),
    ):
        found = run(
            tmp_path, "evaluate", name=name, model_path=trained, retriever_model_path=path, **more, **EVALUATION
        )
        rows = read_jsonl(found / "dev-step-0.jsonl")
        passages = corpus_of_the_world()
        queries, corpus = plain_sides(str(path), [row["query"] for row in rows], passages, **expected)
        scores = torch.tensor([[passage["score"] for passage in row["passages"]] for row in rows])
        assert_close(scores, (queries @ corpus.T).topk(4).values, atol=2e-3, rtol=2e-3)


def test_training_sees_the_settings_and_goes_on_with_them(tmp_path):
    """Stopped and resumed without the flags, tied training has the losses of a run that was not stopped."""
    training = {"train_retriever": True, "eval_data": None, "refresh_index": 2}
    whole = run(tmp_path, name="whole", total_steps=4, **flags(E5), **training)
    losses = logged(whole, "loss/retriever_loss")
    run(tmp_path, name="parts", total_steps=2, **flags(E5), **training)
    parts = run(tmp_path, name="parts", total_steps=4, **training)
    assert logged(parts, "loss/retriever_loss") == losses and len(losses) == 4
    plain = run(tmp_path, name="plain", total_steps=4, **training)
    assert logged(plain, "loss/retriever_loss") != losses


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "average"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_max_tokens": False}, "sqrt"),
        ({"pooling_mode": "mean", "include_prompt": True}, "average"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_directories_of_sentence_transformers(tmp_path, pooling, expected):
    path = sentence_transformer(tmp_path / "a", pooling)
    assert settings_of(path) == SETTINGS | {"pooling": expected, "normalize": True}
    path = sentence_transformer(
        tmp_path / "b", pooling, ("Transformer", "Pooling"), {"query": "q: ", "document": "d: ", "sts": "s: "}
    )
    assert settings_of(path) == SETTINGS | {"pooling": expected, "query_prefix": "q: ", "passage_prefix": "d: "}


def test_our_keys_and_overrides_win_over_modules_json(tmp_path):
    prompts = {"query": "q: ", "document": ""}
    path = sentence_transformer(tmp_path / "a", {"pooling_mode": "cls"}, prompts=prompts, settings={"pooling": "sqrt"})
    assert settings_of(path) == SETTINGS | {"pooling": "sqrt", "normalize": True, "query_prefix": "q: "}
    assert settings_of(path, normalize=False, query_prefix="") == SETTINGS | {"pooling": "sqrt"}
    path = sentence_transformer(tmp_path / "b", {"pooling_mode": "max"})
    assert settings_of(path, pooling="average") == SETTINGS | {"normalize": True}


@pytest.mark.parametrize(
    ("pooling", "modules", "reason"),
    [
        (
            {"pooling_mode_max_tokens": True},
            ("Transformer", "Pooling"),
            "pooling 'max_tokens'; it must be one of average",
        ),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            ("Transformer", "Pooling"),
            r"pooling 'cls_token \+ mean_tokens'",
        ),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling", "Dense"), "lists Dense, which"),
        (None, ("Transformer", "Pooling"), "No such file"),
        (None, ("Transformer",), "cannot be read: KeyError"),
    ],
)
def test_what_sentence_transformers_can_and_we_cannot(tmp_path, pooling, modules, reason):
    path = sentence_transformer(tmp_path / "a", pooling, modules)
    with pytest.raises(OSError, match=f"--retriever_model_path {path}: .*{reason}") as raised:
        load_retriever(str(path), query_side=False, dropout=None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("key", "value"), [("normalize", "yes"), ("query_prefix", None), ("passage_prefix", 3)])
def test_settings_of_a_wrong_type(tmp_path, key, value):
    path = encoder(tmp_path / "encoder", **{key: value})
    with pytest.raises(
        OSError, match=f"--retriever_model_path {path}: .*its config says {key} {value!r}; it must be a"
    ):
        load_retriever(str(path), query_side=False, dropout=None)


def test_the_fingerprint_is_of_what_embeds_a_passage():
    def fingerprint_with(**overrides):
        path = str(world() / "models/retriever")
        return fingerprint(load_retriever(path, query_side=True, dropout=None, overrides=overrides).passage_encoder)

    plain = fingerprint_with()
    assert plain == fingerprint_with(**SETTINGS) == fingerprint_with(query_prefix="query: ")
    changes = [{"pooling": "cls"}, {"pooling": "sqrt"}, {"normalize": True}, {"uncentered_layer_norm": True}]
    changes += [{"passage_prefix": "passage: "}, {"passage_prefix": "passage"}, {"pooling": "cls", "normalize": True}]
    assert len({plain, *(fingerprint_with(**change) for change in changes)}) == 1 + len(changes)


def test_an_index_of_another_prefix_is_refused(tmp_path):
    index = tmp_path / "index"
    run(tmp_path, "evaluate", name="made", save_index_path=index, **flags(E5), **EVALUATION)
    same = flags(E5 | {"query_prefix": "question: "})
    loading = {"load_index_path": index, "passages": None} | EVALUATION
    for name, settings, warned in (("same", same, False), ("other", flags(MINILM) | {"allow_other_index": True}, True)):
        found = run(tmp_path, "evaluate", name=name, **settings, **loading)
        assert ("was made by retriever" in (found / "run.log").read_text()) == warned
    with pytest.raises(SystemExit):
        run(tmp_path, "evaluate", name="refused", **flags(MINILM), **loading)
    assert "insist with --allow_other_index" in (tmp_path / "refused/run.log").read_text()
