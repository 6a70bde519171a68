"""Export a checkpoint to ordinary directories, which transformers and sentence-transformers load without this project.

OUTPUT_DIRECTORY must be new or empty. The script writes

  reader/                                 T5 or language model: config, safetensors, tokenizer, model card
  retriever/                              BERT with its pooling: as a directory of sentence-transformers, model card
  query_encoder/ and passage_encoder/     instead of retriever/, if the retriever was trained on the query side
  options.json                            formats and lengths, for `atlas.load`

Adapters (LoRA) are added to the weights. Each model card (README.md) has code that reads or embeds as this project
does. Configs and vocabularies, which a checkpoint does not contain, come from --reader_model_type and
--retriever_model_path.
"""

import argparse
import json
import shutil
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python preprocessing/export_huggingface.py --model_path experiments/my_experiment --output_directory export
  python preprocessing/export_huggingface.py --model_path models/atlas/base \\
      --reader_model_type google/t5-base-lm-adapt --output_directory export
"""
SENTENCE_MODES = {"average": "mean_tokens", "sqrt": "mean_sqrt_len_tokens", "cls": "cls_token"}
POOLING_CODE = {
    "average": "(hidden * mask).sum(1) / mask.sum(1)",
    "sqrt": "(hidden * mask).sum(1) / mask.sum(1).sqrt()",
    "cls": "hidden[:, 0]",
}
LICENCE = "The weights are under the licence of the checkpoint that they were exported from."
GENERATION = ("max_length", "min_length", "num_beams", "length_penalty")
NORM_PROBES = ("Paris is the capital of France.", "when was the first bridge over the river built", "aardvark")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises: SystemExit with status 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model_path DIR --output_directory DIR [flags]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model_path", metavar="DIR", required=True, help="checkpoint or run of this project, or published checkpoint"
    )
    parser.add_argument("--output_directory", metavar="DIR", type=Path, required=True, help="new, or empty")
    parser.add_argument(
        "--reader_model_type", metavar="NAME", help="hub id or local directory of its reader (default: that of the run)"
    )
    parser.add_argument(
        "--retriever_model_path",
        metavar="NAME",
        help="hub id or local directory of its BERT (default: that of the run, or facebook/contriever)",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the weights (fp32)")
    options = parser.parse_args(arguments)
    output = options.output_directory
    if output.exists() and not (output.is_dir() and next(output.iterdir(), None) is None):
        parser.error(f"--output_directory {output} exists and is not empty: give another one, or remove it")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Parse and export. A user's mistake ends the script with one sentence and status 1."""
    options = parse_options(arguments)
    # These import torch, which a wrong flag should not wait for.
    from safetensors import SafetensorError

    from atlas.config import sentence
    from atlas.files.disk import writing
    from atlas.runtime.tracking import log, report_error, start_log

    start_log(None)
    output = options.output_directory.absolute()
    beside = output.with_name(f"{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with writing(output):
            beside.mkdir(parents=True)
            names = export(
                options.model_path, beside, options.reader_model_type, options.retriever_model_path, options.dtype
            )
            beside.replace(output)
    except (ValueError, OSError, SafetensorError) as error:
        report_error(error, sentence(error))
        sys.exit(1)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for name in names:
        log.info("Wrote %s", options.output_directory / name)


def export(
    model_path: str, output: Path, reader_name: str | None, retriever_name: str | None, dtype: str = "fp32"
) -> list[str]:
    """Write a directory in `output` for each model in a checkpoint; returns their names.

    Raises:
        ValueError: there is no such checkpoint, or it does not fit the configs.
        OSError: configs or vocabularies cannot be found, or the disk is full.
    """
    from atlas.checkpoint import load_checkpoint
    from atlas.command_line import saved_flags
    from atlas.config import OF_THE_JUDGEMENT
    from atlas.runtime.tracking import log

    checkpoint = load_checkpoint(model_path)
    try:
        flags = saved_flags(checkpoint.options, checkpoint.path)
    except ValueError as error:
        if not checkpoint.published:
            raise
        log.warning("%s; the model cards have the defaults instead", error)
        flags = {}
    task = {} if checkpoint.published or "task" not in checkpoint.options else {"task": checkpoint.options["task"]}
    judged = {name: checkpoint.options[name] for name in OF_THE_JUDGEMENT if name in checkpoint.options and flags}
    checkpoint = replace(checkpoint, options={"name": checkpoint.options.get("name")} | flags)
    reader_name = reader_name or flags.get("reader_model_type")
    # Published checkpoints name a path on the machine they were trained on.
    retriever_name = retriever_name or (None if checkpoint.published else flags.get("retriever_model_path"))
    names = []
    if checkpoint.holds("reader"):
        if reader_name is None:
            raise ValueError(
                f"{checkpoint.path} does not say which T5 it has: give --reader_model_type (for the published sizes "
                "google/t5-{base,large,xl,xxl}-lm-adapt)"
            )
        names += export_reader(checkpoint, output, reader_name, dtype)
    if checkpoint.holds("retriever"):
        names += export_retriever(checkpoint, output, retriever_name or "facebook/contriever", dtype)
    # With these flags `atlas.load` answers as the run did. Names of models may be paths on this machine.
    own = {name: value for name, value in flags.items() if name not in ("reader_model_type", "retriever_model_path")}
    sections = {"model": own, "tasks": task, "retriever_training": judged}
    write_json(output / "options.json", {name: options for name, options in sections.items() if options})
    return names


def export_reader(checkpoint: Any, output: Path, name_or_path: str, dtype: str) -> list[str]:
    """Write `reader/`; returns its name. Raises: ValueError, OSError."""
    from transformers.utils.hub import cached_file

    from atlas.model.adapters import merge_saved
    from atlas.model.reader import ALIASES, load_reader
    from atlas.model.tokenization import load_reader_tokenizer

    tokenizer = load_reader_tokenizer(name_or_path)
    reader = load_reader(name_or_path, dropout=None, weights=not checkpoint.reader)
    try:
        if checkpoint.reader:
            reader.load_state(checkpoint.reader)
        merge_saved(reader, "reader", [reader], name_or_path, checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} and --reader_model_type {name_or_path}: {error}") from error
    config = reader.config
    if not reader.fuses:
        state = {name: parameter.detach() for name, parameter in reader.named_parameters()}
        directory = write_model(output / "reader", type(reader).__name__, config, {}, state, dtype)
        reader.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_card(directory, language_model_card(checkpoint, name_or_path, type(reader).__name__, tokenizer.chats))
        return [directory.name]
    one_matrix = reader.lm_head.weight is reader.shared.weight
    if config.scale_decoder_outputs and not one_matrix:
        raise ValueError(
            f"--reader_model_type {name_or_path} has one matrix for embeddings and output (T5 v1.0), and "
            f"{checkpoint.path} has two: give the T5 that its training started from"
        )
    state = {name: tensor for name, tensor in reader.state_dict().items() if name not in ALIASES}
    if config.scale_decoder_outputs:
        del state["lm_head.weight"]
    elif one_matrix:  # the config says that there are two, so the file has both
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    # This key of the config also says whether the decoder's output is scaled. transformers 5 sets it to True for every
    # model.
    settings = {"tie_word_embeddings": config.scale_decoder_outputs}
    directory = write_model(output / "reader", "T5ForConditionalGeneration", config, settings, state, dtype)
    tokenizer.save_pretrained(directory)
    if pieces := cached_file(name_or_path, "spiece.model", _raise_exceptions_for_missing_entries=False):
        shutil.copyfile(pieces, directory / "spiece.model")
    write_card(directory, reader_card(checkpoint, name_or_path))
    return [directory.name]


def export_retriever(checkpoint: Any, output: Path, name_or_path: str, dtype: str) -> list[str]:
    """Write `retriever/`, or a directory for each of two encoders; returns the names. Raises: ValueError, OSError."""
    from transformers import AutoTokenizer

    from atlas.model.adapters import merge_saved
    from atlas.model.inputs import RETRIEVER_MAXLENGTH
    from atlas.model.retriever import load_retriever, load_retriever_state, state_is_untied
    from atlas.model.tokenization import load_retriever_tokenizer
    from atlas.runtime.tracking import log

    tokenizer = load_retriever_tokenizer(name_or_path)
    untied = state_is_untied(checkpoint.retriever) or "query_encoder" in checkpoint.adapters
    retriever = load_retriever(
        name_or_path,
        query_side=untied,
        dropout=None,
        weights=not checkpoint.retriever,
        overrides=checkpoint.retriever_config,
    )
    both = retriever.query_encoder, retriever.passage_encoder
    try:
        if checkpoint.retriever:
            load_retriever_state(retriever, checkpoint.retriever)
        merge_saved(retriever.query_encoder, "query_encoder", both, name_or_path, checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} and --retriever_model_path {name_or_path}: {error}") from error
    encoders = {"retriever": retriever.query_encoder}
    if untied:
        encoders = {"query_encoder": retriever.query_encoder, "passage_encoder": retriever.passage_encoder}
    longest = min(retriever.max_length, RETRIEVER_MAXLENGTH)
    max_length = min(checkpoint.options.get("text_maxlength", longest), longest)
    for name, encoder in encoders.items():
        directory = write_model(output / name, "BertModel", encoder.config, {}, encoder.state_dict(), dtype)
        AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False).save_pretrained(directory)
        write_sentence_files(directory, encoder.config, max_length)
        gap = norm_gap(encoder, tokenizer) if encoder.config.uncentered_layer_norm else 0.0
        if gap:
            log.warning(
                "%s: it has the layer norm of the published retrievers, which BERT does not have: embeddings computed "
                "by transformers differ by %.1e of their length (measured); the model card says so",
                name,
                gap,
            )
        write_card(directory, retriever_card(checkpoint, name, name_or_path, encoder.config, max_length, gap))
    return list(encoders)


def write_model(
    directory: Path, kind: str, config: Any, settings: dict[str, Any], state: dict[str, Any], dtype: str
) -> Path:
    """Write config.json and model.safetensors into a new directory and return it."""
    import torch

    from atlas.files.tensors import save_tensors

    directory.mkdir()
    to = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    described = config.to_dict() | {"architectures": [kind], "dtype": str(to).removeprefix("torch.")} | settings
    described.pop("_name_or_path", None)  # may be a path on this machine
    write_json(directory / "config.json", described)
    weights = {name: tensor.to(to).contiguous() for name, tensor in state.items()}
    save_tensors(directory / "model.safetensors", weights, {"format": "pt"})
    return directory


def write_sentence_files(directory: Path, config: Any, max_length: int) -> None:
    """The files that sentence-transformers reads in addition to a BERT: modules, their settings, prefixes of texts."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * config.normalize
    write_json(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    for path, _ in modules[1:]:
        (directory / path).mkdir()
    modes = {f"pooling_mode_{mode}": ours == config.pooling for ours, mode in SENTENCE_MODES.items()}
    write_json(directory / "1_Pooling/config.json", {"word_embedding_dimension": config.hidden_size, **modes})
    # There are no pooler weights, and none are needed.
    bert = {"max_seq_length": max_length, "do_lower_case": False, "model_args": {"add_pooling_layer": False}}
    write_json(directory / "sentence_bert_config.json", bert)
    prompts = {"query": config.query_prefix, "document": config.passage_prefix}
    write_json(
        directory / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "dot"},
    )


def norm_gap(encoder: Any, tokenizer: Any) -> float:
    """How far embeddings move, relative to their length, with BERT's layer norm, which the encoder keeps afterwards."""
    import torch

    from atlas.model.retriever import UncenteredLayerNorm
    from atlas.model.tokenization import pad_rows

    ids, mask = pad_rows(tokenizer.encode(NORM_PROBES), tokenizer.pad_id)
    with torch.no_grad():
        before = encoder(ids, mask)
        for module in encoder.modules():
            if isinstance(module, UncenteredLayerNorm):
                module.__class__ = torch.nn.LayerNorm
        return ((encoder(ids, mask) - before).norm(dim=-1) / before.norm(dim=-1)).max().item()


def generation_arguments(flags: dict[str, Any], *, behind_prompt: bool = False) -> str:
    """The `--generation` flags as arguments of `generate`; `behind_prompt`: of what comes behind a prompt."""
    from atlas.config import Model

    values = {name: flags.get(f"generation_{name}", getattr(Model, f"generation_{name}")) for name in GENERATION}
    longest, least = values["max_length"], values["min_length"]
    if behind_prompt:  # without T5's start token
        least = None if least is None else max(0, least - 1)
        said = [f"max_new_tokens={longest - 1}", *([] if least is None else [f"min_new_tokens={least}"])]
    else:
        said = [f"max_length={longest}", *([] if least is None else [f"min_length={least}"])]
    others = ("num_beams", "length_penalty")
    said += [f"{name}={values[name]}" for name in others if values[name] != getattr(Model, f"generation_{name}")]
    return ", ".join(said)


def reader_card(checkpoint: Any, name_or_path: str) -> str:
    """The model card of a reader, with code that reads several passages."""
    from atlas.config import Model, Tasks

    flags = checkpoint.options
    encoder_format = flags.get("encoder_format", Model.encoder_format)
    query = flags.get("qa_prompt_format", Tasks.qa_prompt_format).format(question="what is the capital of France?")
    longest = flags.get("text_maxlength", Model.text_maxlength)
    generation = generation_arguments(flags)
    return f"""{front_matter("transformers", ["fusion-in-decoder", "t5"], name_or_path)}
# Reader of {origin(checkpoint)}

A T5 that answers from passages as a Fusion-in-Decoder (Izacard & Grave 2021): the encoder reads each passage
separately, together with the query, and the decoder attends to all of them at once. It was trained as the reader of
[Atlas](https://arxiv.org/abs/2208.03299). With one passage it is used like any T5; with several:

```python
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

directory = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(directory)
reader = T5ForConditionalGeneration.from_pretrained(directory).eval()

query = {json.dumps(query, ensure_ascii=False)}
passages = [
    {{"id": "1", "title": "Paris", "section": "", "text": "Paris is the capital of France."}},
    {{"id": "2", "title": "Lyon", "section": "", "text": "Lyon lies where the Rhône meets the Saône."}},
]
texts = [{json.dumps(encoder_format, ensure_ascii=False)}.format(query=query, **passage) for passage in passages]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={longest}, return_tensors="pt")
mask = inputs.attention_mask.view(1, -1)  # (1, K·L): K passages of L tokens
with torch.no_grad():
    hidden = reader.encoder(**inputs).last_hidden_state.flatten(0, 1)[None]  # (1, K·L, d)
    fused = BaseModelOutput(last_hidden_state=hidden)
    answer = reader.generate(encoder_outputs=fused, attention_mask=mask, {generation})
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

Use the tokenizer in this directory. It keeps a token for the space before `<extra_id_0>`. The reader was trained with
it, but T5's own tokenizer in transformers 5 drops it.

{LICENCE}
"""


def language_model_card(checkpoint: Any, name_or_path: str, kind: str, chats: bool) -> str:
    """The model card of a decoder-only reader, with code that reads several passages."""
    from atlas.config import Model, Tasks
    from atlas.model.prompts import asked, with_lines

    flags = checkpoint.options
    question = flags.get("qa_prompt_format", Tasks.qa_prompt_format).format(question="what is the capital of France?")
    formats = {
        name: json.dumps(with_lines(flags.get(name, getattr(Model, name))), ensure_ascii=False)
        for name in ("reader_prompt_format", "passage_format")
    }
    inputs = 'tokenizer(prompt, return_tensors="pt")'
    if chats and flags.get("chat_template", Model.chat_template):
        said = '[{"role": "user", "content": prompt}]'
        inputs = (
            f"tokenizer.apply_chat_template(\n    {said},\n    add_generation_prompt=True, enable_thinking=False, "
            'return_tensors="pt"\n)'
        )
    begun = flags.get("decoder_prompt_format")
    begins = "" if begun is None else f"\n\nIn its run, answers began with `{begun}` (of the query)."
    return f"""{front_matter("transformers", ["retrieval-augmented-generation"], name_or_path)}
# Reader of {origin(checkpoint)}

A language model that answers from passages in its prompt, trained as a reader by the method of
[Atlas](https://arxiv.org/abs/2208.03299). Each passage was cut to
{flags.get("text_maxlength", Model.text_maxlength)} tokens.{begins}

```python
from transformers import AutoTokenizer, {kind}

directory = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(directory)
reader = {kind}.from_pretrained(directory).eval()

passages = [
    {{"id": "1", "title": "Paris", "section": "", "text": "Paris is the capital of France."}},
    {{"id": "2", "title": "Lyon", "section": "", "text": "Lyon lies where the Rhône meets the Saône."}},
]
texts = [{formats["passage_format"]}.format(**passage).strip() for passage in passages]
prompt = {formats["reader_prompt_format"]}.format(
    passages="\\n\\n".join(texts), query={json.dumps(asked(question), ensure_ascii=False)}
)
inputs = {inputs}
answer = reader.generate(**inputs, {generation_arguments(flags, behind_prompt=True)}, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
```

{LICENCE}
"""


def retriever_card(checkpoint: Any, name: str, name_or_path: str, config: Any, max_length: int, gap: float) -> str:
    """The model card of an encoder, with code for transformers and for sentence-transformers."""
    from atlas.config import Model, Tasks

    flags = checkpoint.options
    query = flags.get("qa_prompt_format", Tasks.qa_prompt_format).format(question="what is the capital of France?")
    passage = flags.get("retriever_format", Model.retriever_format)
    passage = passage.format(id="1", title="Paris", section="", text="Paris is the capital of France.")
    which = {
        "retriever": "It embeds both queries and passages.",
        "query_encoder": "It embeds queries; passages are embedded by the encoder in `passage_encoder`.",
        "passage_encoder": "It embeds passages; queries are embedded by the encoder in `query_encoder`.",
    }[name]
    return f"""{front_matter("sentence-transformers", ["sentence-similarity", "bert"], name_or_path)}
# {name.replace("_", " ").capitalize()} of {origin(checkpoint)}

A BERT that maps a text to {config.hidden_size} numbers, trained as the retriever of
[Atlas](https://arxiv.org/abs/2208.03299) to find passages that help its reader. {which}
Similarity is the inner product.
{norm_warning(gap) if gap else ""}
With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

directory = "."  # the directory of this file
encoder = SentenceTransformer(directory)
queries = encoder.encode_query([{json.dumps(query, ensure_ascii=False)}])
passages = encoder.encode_document([{json.dumps(passage, ensure_ascii=False)}])
print(queries @ passages.T)
```

With transformers alone:

{transformers_code(config, max_length, query, passage)}
A query is the whole prompt that the reader is given; a passage is its title and text, formatted as above.

{LICENCE}
"""


def norm_warning(gap: float) -> str:
    """A paragraph for encoders whose layer norm BERT does not have; `gap` as from `norm_gap`."""
    return f"""
**Not quite the same numbers.** This encoder was trained with a layer norm that divides by the root of the mean square
without subtracting the mean first. BERT has no such norm, so embeddings computed by transformers and
sentence-transformers differ from those it was trained with by {gap:.1e} of their length (measured on
{len(NORM_PROBES)} short texts). Do not use them to search an index that Atlas has built.
`"uncentered_layer_norm": true` in config.json tells Atlas to use the right norm.
"""


def transformers_code(config: Any, max_length: int, query: str, passage: str) -> str:
    """A block of Python that embeds the query and the passage with transformers alone."""
    normalize = "\n    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)" if config.normalize else ""
    return f"""\

```python
import torch
from transformers import AutoTokenizer, BertModel

directory = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(directory)
encoder = BertModel.from_pretrained(directory, add_pooling_layer=False).eval()


def embed(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state  # (n, L, D)
    mask = inputs.attention_mask[..., None]
    embeddings = {POOLING_CODE[config.pooling]}{normalize}
    return embeddings


queries = embed([{json.dumps(config.query_prefix + query, ensure_ascii=False)}])
passages = embed([{json.dumps(config.passage_prefix + passage, ensure_ascii=False)}])
print(queries @ passages.T)
```
"""


def front_matter(library: str, tags: list[str], name_or_path: str) -> str:
    """The metadata that the hub reads at the top of a card. A local directory is not named as base model."""
    base = [] if Path(name_or_path).is_dir() else [f"base_model: {name_or_path}"]
    return "\n".join(
        ["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in ["atlas", *tags]), *base, "---"]
    )


def origin(checkpoint: Any) -> str:
    """Which checkpoint the model comes from, without paths of this machine."""
    return f"{checkpoint.options.get('name') or checkpoint.path.name}, step {checkpoint.step}"


def write_card(directory: Path, text: str) -> None:
    (directory / "README.md").write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
