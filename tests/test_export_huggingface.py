"""Exported checkpoints, loaded without this project: by the code of their model cards, which is transformers alone."""

import argparse
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, T5ForConditionalGeneration

import export_huggingface
from atlas.checkpoint import load_checkpoint
from atlas.config import Model
from atlas.model.inputs import Inputs
from atlas.model.reader import load_reader, load_reader_state
from atlas.model.retriever import load_retriever, load_retriever_state
from atlas.model.tokenization import load_reader_tokenizer, load_retriever_tokenizer, pad_rows
from make_tiny_models import build_tiny_models
from tests.kit import run, world
from tests.parity import parity_kit
from tests.ranks import scratch_directory
from tests.test_checkpoint import published

TEXTS = ["what is the river of Bako?", "The bird of Koriba is Selnu. " * 3, "a  b  ", "Vorethlin <extra_id_0> ,", ""]


def export(model_path, output, *words):
    """What the command gives, with the tiny models' configs where nothing else is said."""
    export_huggingface.main(["--model_path", str(model_path), "--output_directory", str(output), *map(str, words)])
    assert not list(output.parent.glob(f"{output.name}.????????.partial"))
    return output


def card_code(directory, with_sentence_transformers=False):
    """Run the example of a model card where the card lies; its variables."""
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if ("sentence_transformers" in block) == with_sentence_transformers)
    assert "src" not in code
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(compile(code, str(directory / "README.md"), "exec"), names)
    return names


def own_encoders(checkpoint, untied):
    retriever = load_retriever(
        str(world() / "models/retriever"),
        query_side=untied,
        dropout=None,
        weights=False,
        overrides=checkpoint.retriever_config,
    )
    load_retriever_state(retriever, checkpoint.retriever)
    return retriever


def embed(encoder, texts, max_length=64):
    tokenizer = load_retriever_tokenizer(str(world() / "models/retriever"))
    with torch.no_grad():
        return encoder(*pad_rows(tokenizer.encode(texts, max_length), tokenizer.pad_id))


def change_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("scale_decoder_outputs", None)
    path.write_text(json.dumps(config | changes))


@cache
def v11_reader():
    """The directory of the tiny reader as a T5 v1.1: with a matrix for the embeddings and another for the output."""
    directory = Path(scratch_directory()) / "reader"
    shutil.copytree(world() / "models/reader", directory)
    change_config(directory, tie_word_embeddings=False)
    return directory


def models():
    return ["--reader_model_type", str(v11_reader()), "--retriever_model_path", str(world() / "models/retriever")]


def untie(checkpoint_directory):
    """A reader whose two matrices differ, in a published checkpoint; its retriever is tied."""
    reader = load_reader(str(v11_reader()), dropout=None)
    reader.tie_output_embeddings(False)
    torch.manual_seed(0)
    reader.lm_head.weight.data.normal_()
    retriever = load_retriever(str(world() / "models/retriever"), query_side=False, dropout=None)
    state = {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    state |= {f"retriever.{name}": tensor for name, tensor in retriever.state_dict().items()}
    return published(checkpoint_directory, state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose two encoders have parted, and its export."""
    directory = tmp_path_factory.mktemp("trained")
    flags = {"train_retriever": True, "query_side_retriever_training": True, "eval_data": None}
    run(directory, total_steps=3, generation_max_length=12, **flags)
    return directory / "run", export(directory / "run", directory / "export")


def test_what_is_written(trained):
    _, output = trained
    directories = sorted(path for path in output.iterdir() if path.is_dir())
    assert [path.name for path in directories] == ["passage_encoder", "query_encoder", "reader"]
    assert str(world()) not in (output / "options.json").read_text()
    for directory in directories:
        names = {path.name for path in directory.iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
        assert str(world()) not in "".join(path.read_text() for path in directory.glob("*.json"))
        assert str(world()) not in (directory / "README.md").read_text()
    assert not torch.equal(*(load_weights(output / f"{side}_encoder") for side in ("query", "passage")))


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_in_half_the_bytes(trained, tmp_path, dtype, error):
    run_directory, whole = trained
    half = export(run_directory, tmp_path / "half", "--dtype", dtype)
    for side in ("query", "passage"):
        weights = [load_weights(output / f"{side}_encoder") for output in (whole, half)]
        assert weights[1].dtype == torch.float32  # rounded in the file, computed with as ever
        assert_close(weights[1], weights[0], rtol=error, atol=1e-6)
    sizes = [(output / "reader/model.safetensors").stat().st_size for output in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert T5ForConditionalGeneration.from_pretrained(half / "reader").dtype == getattr(
        torch, {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    )


def load_weights(directory):
    retriever = load_retriever(str(directory), query_side=False, dropout=None)
    return torch.cat([tensor.flatten() for tensor in retriever.query_encoder.state_dict().values()])


def test_the_reader_reads_as_it_did(trained):
    directory, output = trained
    checkpoint = load_checkpoint(directory)
    names = card_code(output / "reader")
    reader = load_reader(str(world() / "models/reader"), dropout=None, weights=False)
    load_reader_state(reader, checkpoint.reader)
    for name, tensor in names["reader"].state_dict().items():
        assert torch.equal(tensor, reader.state_dict()[name]), name
    tokenizer = load_reader_tokenizer(str(world() / "models/reader"))
    own = Inputs(Model(text_maxlength=64), tokenizer, None, device=torch.device("cpu"))
    ids, mask, _ = own.reader([names["query"]], [names["passages"]])
    assert torch.equal(ids[0], names["inputs"].input_ids)
    decoder_ids = torch.tensor([[0, 7, 8, 9]])
    with torch.no_grad():
        theirs = names["reader"](
            encoder_outputs=names["fused"], attention_mask=names["mask"], decoder_input_ids=decoder_ids
        ).logits
        ours = reader.logits(reader.encode(ids, mask), mask.flatten(1), decoder_ids)
    assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    answer = reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=12)[0]
    assert names["answer"][0].tolist()[1 : 1 + len(answer)] == answer


@pytest.mark.parametrize("side", ["query", "passage"])
def test_both_encoders_embed_as_they_did(trained, side):
    directory, output = trained
    retriever = own_encoders(load_checkpoint(directory), untied=True)
    names = card_code(output / f"{side}_encoder")
    assert_close(names["embed"](TEXTS), embed(getattr(retriever, f"{side}_encoder"), TEXTS), atol=1e-5, rtol=0)


def test_the_exports_are_models_of_ours_too(trained):
    directory, output = trained
    checkpoint = load_checkpoint(directory)
    own = own_encoders(checkpoint, untied=True)
    for side in ("query", "passage"):
        again = load_retriever(str(output / f"{side}_encoder"), query_side=False, dropout=None)
        assert torch.equal(embed(again.query_encoder, TEXTS), embed(getattr(own, f"{side}_encoder"), TEXTS))
    reader, expected = load_reader(str(output / "reader"), dropout=None), checkpoint.reader
    assert all(torch.equal(reader.state_dict()[name], tensor) for name, tensor in expected.items())


def test_the_tokenizer_gives_the_published_ids(tmp_path):
    """Those of the published system, where they are recorded; transformers' own T5 tokenizer would not."""
    kit = parity_kit()
    load_reader_tokenizer(str(kit / "models/reader")).save_pretrained(tmp_path)
    shutil.copy(kit / "models/reader/config.json", tmp_path)  # so that AutoTokenizer knows that it is a T5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for probe in json.loads((kit / "t5_tokenizer.json").read_text()):
        assert tokenizer(probe["text"]).input_ids == probe["ids_with_eos"], probe
        assert tokenizer(probe["text"], add_special_tokens=False).input_ids == probe["ids"], probe
        assert tokenizer.decode(probe["ids"], skip_special_tokens=True) == probe["decoded_without_special_tokens"]


def test_separate_embeddings_survive_and_the_norm_is_told(tmp_path, capsys):
    checkpoint = untie(tmp_path / "checkpoint")
    output = export(checkpoint, tmp_path / "export", *models())
    assert sorted(path.name for path in output.iterdir()) == ["options.json", "reader", "retriever"]
    state = T5ForConditionalGeneration.from_pretrained(output / "reader").state_dict()
    saved = load_checkpoint(checkpoint)
    for name in ("shared.weight", "lm_head.weight"):
        assert torch.equal(state[name], saved.reader[name])
    assert not torch.equal(state["shared.weight"], state["lm_head.weight"])
    assert json.loads((output / "reader/config.json").read_text())["tie_word_embeddings"] is False

    said, card = capsys.readouterr().out, (output / "retriever/README.md").read_text()
    gap = re.search(r"differ by (\S+) of their length \(measured\)", said)[1]
    assert f"by {gap} of their length" in card and "uncentered_layer_norm" in card
    own = own_encoders(saved, untied=False).query_encoder
    theirs = card_code(output / "retriever")["embed"](list(export_huggingface.NORM_PROBES))
    difference = theirs - (expected := embed(own, list(export_huggingface.NORM_PROBES)))
    assert (difference.norm(dim=-1) / expected.norm(dim=-1)).max().item() == pytest.approx(float(gap), rel=0.1)
    again = load_retriever(str(output / "retriever"), query_side=False, dropout=None).query_encoder
    assert torch.equal(embed(again, TEXTS), embed(own, TEXTS))  # ours honours the config


@pytest.mark.parametrize("tied_in_config", [True, False])
def test_one_matrix_for_both(tmp_path, tied_in_config):
    """T5 v1.0, whose decoder output is scaled; and a v1.1 whose two matrices are equal."""
    shutil.copytree(world() / "models/reader", tmp_path / "reader")
    change_config(tmp_path / "reader", tie_word_embeddings=tied_in_config)
    reader = load_reader(str(tmp_path / "reader"), dropout=None)
    reader.tie_output_embeddings(True)
    state = {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    checkpoint = published(tmp_path / "checkpoint", state)
    output = export(checkpoint, tmp_path / "export", "--reader_model_type", tmp_path / "reader")
    assert sorted(path.name for path in output.iterdir()) == ["options.json", "reader"]
    ids, decoder_ids = torch.arange(3, 19)[None], torch.tensor([[0, 5, 6]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = T5ForConditionalGeneration.from_pretrained(output / "reader").eval()
        theirs = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        ours = reader.logits(reader.encode(ids[None], mask[None]), mask, decoder_ids)
    assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


SETTINGS = [
    {"pooling": "average"},
    {"pooling": "sqrt", "query_prefix": "query: ", "passage_prefix": "passage: "},
    {"pooling": "cls", "normalize": True, "query_prefix": 'say "this": '},
]


@pytest.fixture(params=SETTINGS, ids=lambda settings: settings["pooling"])
def pooled(request, tmp_path):
    """A retriever directory with these settings, a checkpoint of it, and the checkpoint's export."""
    shutil.copytree(world() / "models/retriever", tmp_path / "retriever")
    change_config(tmp_path / "retriever", **request.param)
    flags = {"retriever_model_path": tmp_path / "retriever", "total_steps": 1, "eval_data": None}
    run(tmp_path, train_retriever=True, **flags)
    return tmp_path / "run", export(tmp_path / "run", tmp_path / "export") / "retriever"


def own_sides(directory):
    retriever = own_encoders(load_checkpoint(directory), untied=False)
    return (
        embed(retriever.query_encoder, [retriever.query_prefix + text for text in TEXTS]),
        embed(retriever.query_encoder, [retriever.passage_prefix + text for text in TEXTS]),
        retriever,
    )


def test_poolings_and_prefixes(pooled):
    directory, output = pooled
    queries, passages, retriever = own_sides(directory)
    names = card_code(output)
    assert_close(names["embed"]([retriever.query_prefix + text for text in TEXTS]), queries, atol=1e-5, rtol=0)
    prompt = "question: what is the capital of France? answer: <extra_id_0>"
    assert_close(names["queries"], names["embed"]([retriever.query_prefix + prompt]), atol=0, rtol=0)
    again = load_retriever(str(output), query_side=False, dropout=None)
    assert (again.query_prefix, again.passage_prefix) == (retriever.query_prefix, retriever.passage_prefix)
    # and where only the files of sentence-transformers say how to embed
    config = json.loads((output / "config.json").read_text())
    for key in ("pooling", "normalize", "query_prefix", "passage_prefix"):
        del config[key]
    (output / "config.json").write_text(json.dumps(config))
    again = load_retriever(str(output), query_side=False, dropout=None)
    assert (again.query_prefix, again.passage_prefix) == (retriever.query_prefix, retriever.passage_prefix)
    texts = [again.passage_prefix + text for text in TEXTS]
    assert torch.equal(embed(again.query_encoder, texts), passages)


def test_sentence_transformers(pooled):
    pytest.importorskip("sentence_transformers")
    directory, output = pooled
    queries, passages, _ = own_sides(directory)
    encoder = card_code(output, with_sentence_transformers=True)["encoder"]
    assert_close(torch.tensor(encoder.encode_query(TEXTS)), queries.cpu(), atol=1e-5, rtol=0)
    assert_close(torch.tensor(encoder.encode_document(TEXTS)), passages.cpu(), atol=1e-5, rtol=0)
    assert encoder.similarity_fn_name == "dot" and encoder.max_seq_length == 64


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--output_directory", "full"], 2, "full exists and is not empty"),
        (["--output_directory", "file"], 2, "file exists and is not empty"),
        (["--model_path", "empty"], 1, "empty holds no checkpoint"),
        ([], 1, "does not say which T5 it has: give --reader_model_type"),
        (["--reader_model_type", "nowhere"], 1, "--reader_model_type nowhere: cannot load"),
        (["--reader_model_type", "wide"], 1, "and --reader_model_type wide: these weights do not fit the reader"),
        (["--reader_model_type", "tied"], 1, "has one matrix for embeddings and output (T5 v1.0), and"),
        (["--reader_model_type", "{reader}"], 1, "--retriever_model_path facebook/contriever: cannot load"),
        (
            ["--reader_model_type", "{reader}", "--retriever_model_path", "{reader}"],
            1,
            "/reader: cannot load",
        ),
    ],
)
def test_refusals_leave_nothing(tmp_path, monkeypatch, capfd, words, status, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "full/x", tmp_path / "file"):
        path.write_text("precious")
    untie(tmp_path / "checkpoint")
    if "wide" in words:
        build_tiny_models(["a b c"] * 20, tmp_path, vocabulary_size=300, seed=0)
        (tmp_path / "reader").rename("wide")
    shutil.copytree(world() / "models/reader", tmp_path / "tied")
    change_config(tmp_path / "tied", tie_word_embeddings=True)
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(reader=v11_reader()) for word in words]
    with pytest.raises(SystemExit) as ended:
        export_huggingface.main(["--model_path", "checkpoint", "--output_directory", "export", *words])
    assert ended.value.code == status
    said = capfd.readouterr().err
    assert sentence in said and "Traceback" not in said, said
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "full/x").read_text() == "precious"


def test_an_empty_directory_is_filled_and_nothing_else_is_touched(tmp_path):
    checkpoint = untie(tmp_path / "checkpoint")
    (tmp_path / "export").mkdir()
    (tmp_path / "export.partial/reader").mkdir(parents=True)
    export(checkpoint, tmp_path / "export", *models())
    assert (tmp_path / "export/reader/model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "export", "export.partial"]
    assert (tmp_path / "export.partial/reader").is_dir()


def test_the_flags_of_a_run_are_kept_with_a_checkpoint(trained, tmp_path):
    directory, _ = trained
    assert load_checkpoint(directory).options["n_context"] == 4
    assert load_checkpoint(untie(tmp_path / "checkpoint")).options["name"] == "x"


def test_options_that_a_flag_cannot_have(trained, tmp_path, capfd):
    """One sentence for a checkpoint of ours; those of a published one are left out, and that is said."""
    checkpoint = shutil.copytree((trained[0] / "checkpoint/latest").resolve(), tmp_path / "step-3")
    options = json.loads((checkpoint / "options.json").read_text())
    options["model"]["text_maxlength"] = "many"
    (checkpoint / "options.json").write_text(json.dumps(options))
    with pytest.raises(SystemExit) as ended:
        export(checkpoint, tmp_path / "export")
    said = capfd.readouterr().err
    assert ended.value.code == 1 and "--text_maxlength is 'many' there, and must be an integer" in said, said
    assert "Traceback" not in said and not (tmp_path / "export").exists()
    odd = untie(tmp_path / "published")
    state = {f"reader.{name}": tensor for name, tensor in load_checkpoint(odd).reader.items()}
    odd = published(tmp_path / "odd-flags", state, opt=argparse.Namespace(text_maxlength=None, name="odd"))
    output = export(odd, tmp_path / "odd", *models())
    assert "Reader of odd, step 7" in (output / "reader/README.md").read_text()
    assert "--text_maxlength is None there, and must be an integer" in capfd.readouterr().out


def test_the_card_generates_as_the_run_did(tmp_path):
    beams = {"generation_num_beams": 2, "generation_min_length": 3, "generation_length_penalty": 0.5}
    directory = run(tmp_path, total_steps=1, eval_data=None, closed_book=True, passages=None, **beams)
    card = (export(directory, tmp_path / "export") / "reader/README.md").read_text()
    assert "mask, max_length=6, min_length=3, num_beams=2, length_penalty=0.5)" in card
