"""Every flag, with its default, its help and its bounds, in frozen sections.

Only the standard library is imported here, so that `--help` and a mistyped flag answer at once.
"""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

# The tasks that come with the package, for help texts. Users add others, so --task is checked when a run starts.
TASK_NAMES = ("base", "qa", "cloze", "mlm", "lm", "section", "multiple_choice", "fever", "kilt")
TOKENIZING_TASKS = ("mlm", "multiple_choice")  # they build queries with the reader's tokenizer
GOLD_SCORE_MODES = ("ppmean", "pdist", "evalnormsum", "adist", "loop", "emdr", "question")
POOLINGS = ("average", "sqrt", "cls")
PERMUTATIONS = ("single", "cyclic", "all")
# The libraries that --report_to knows: module -> how to install it. tensorboard, the default, may be missing.
REPORTERS = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
}
# What a model was trained with and is to be used with: evaluate.py takes these from the checkpoint.
OF_THE_MODEL = (
    *("reader_model_type", "retriever_model_path", "retriever_pooling", "retriever_normalize"),
    *("retriever_query_prefix", "retriever_passage_prefix", "text_maxlength", "target_maxlength", "n_context"),
    *("encoder_format", "retriever_format", "decoder_format", "decoder_prompt_format", "qa_prompt_format"),
    *("reader_prompt_format", "passage_format", "chat_template", "rerank_by_reader"),
    *("generation_max_length", "generation_min_length", "generation_num_beams", "generation_length_penalty"),
)
# How the reader judges passages, for --write_evidence.
OF_THE_JUDGEMENT = ("gold_score_mode", "gold_question_weight", "temperature_gold")
LARGEST = 2**63 - 1  # of the integers that numpy and torch compute with
# Bounds of a number: what must hold, and how to say it. Comparisons with NaN are false, so NaN is always refused.
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "least": (operator.ge, "it must be at least"),
    "most": (operator.le, "it must be at most"),
    "above": (operator.gt, "it must be above"),
    "below": (operator.lt, "it must be below"),
}


def flag(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] | None = None,
    fields: str = "",
    constant: bool = False,
    blank: bool = False,
    **bounds: float,
) -> Any:
    """A field of a section: its default, its line of help, and the values it may have.

    Args:
        choices: all values there are.
        fields: of a format string, the names it may use, separated by spaces.
        constant: a format string need not use any of them.
        blank: a string may be empty.
        bounds: `least` and `most` are allowed values themselves, `above` and `below` are not. Besides, every number
            must be finite, and every integer within 64 bits.
    """
    assert bounds.keys() <= BOUNDS.keys()
    limits = {"choices": choices, "fields": fields, "constant": constant, "blank": blank, "bounds": bounds}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Run:
    """Run"""

    name: str = flag("experiment_name", "name of the experiment: its directory under --checkpoint_dir")
    checkpoint_dir: str = flag("./checkpoint/", "directory for all experiments")
    model_path: str = flag(
        "none", "checkpoint to use, ours or published; none: that of --name, else the models' own weights"
    )
    seed: int = flag(0, "seed of every random choice", least=0, most=2**64 - 1)
    log_freq: int = flag(100, "steps between lines in run.log", least=1)
    report_to: str = flag(
        "tensorboard",
        "libraries that draw curves, separated by commas: tensorboard, wandb, trackio; or none, metrics.jsonl alone",
    )
    eval_freq: int = flag(500, "steps between evaluations", least=1)
    save_freq: int = flag(5000, "steps between checkpoints", least=1)
    train_data: tuple[str, ...] = flag((), "jsonl files to train on")
    eval_data: tuple[str, ...] = flag((), "jsonl files to evaluate on")
    qrels: tuple[str, ...] = flag((), "relevance judgements as TREC's or BEIR's, a file for each one of --eval_data")
    bad_lines: str = flag(
        "error",
        "what to do with lines of data and corpus that cannot be read. skip: leave them out, count them, and write "
        "them to bad_lines.*.jsonl beside run.log",
        choices=("error", "skip"),
    )
    metric_unicode: str = flag(
        "off",
        "nfc: accuracy, exact match, F1 and ROUGE take the spellings of a character in Unicode (NFC, NFD) for one, as "
        "recall@k by answers always does; off: as published",
        choices=("off", "nfc"),
    )
    write_results: bool = flag(False, "write queries, generations and passages of every evaluation to jsonl files")
    dont_write_passages: bool = flag(False, "leave the passages out of the result files")
    write_evidence: bool = flag(
        False,
        "write into the result files how useful each passage was to the reader for its answer, as a probability over "
        "them (its judgement by --gold_score_mode); it takes one more pass of the decoder for each passage",
    )
    device: str = flag(
        "auto", "auto: a GPU for each process if the machine has any, else the CPU", choices=("auto", "cuda", "cpu")
    )
    local_rank: int = flag(-1, "accepted for compatibility: torchrun's environment decides")
    main_port: int = flag(-1, "accepted for compatibility: torchrun's environment decides")
    per_gpu_batch_size: int = flag(1, "examples per process and step", least=1)
    per_gpu_eval_batch_size: int | None = flag(
        None, "the same in evaluations (--per_gpu_batch_size, at least what fits 8,192 tokens; 32,768 on GPUs)", least=1
    )
    per_gpu_embedder_batch_size: int = flag(512, "passages of full length per batch when the index is built", least=1)
    embedder_precision: str | None = flag(
        None, "precision of the encoder outside training (fp32 on CPU, fp16 on CUDA)", choices=("fp32", "fp16", "bf16")
    )
    shuffle: bool = flag(False, "shuffle the training data, differently in every epoch")
    verify: str = flag(
        "sample",
        "look for damage in the checkpoint and the index that are opened, by their checksums. off: not at all; sample: "
        "in small files and 1 % of large ones, while the run goes on; full: in all, before the first step",
        choices=("off", "sample", "full"),
    )

    @property
    def reporters(self) -> list[str]:
        """The libraries of --report_to, each once."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in dict.fromkeys(names) if name != "none"]


@dataclass(frozen=True)
class Index:
    """Index"""

    passages: tuple[str, ...] = flag(
        (), "corpus: Atlas, BEIR, Tevatron or FlashRAG jsonl, DPR tsv, also .gz; a saved index has its own"
    )
    max_passages: int = flag(-1, "index this many passages at most; -1: all", least=-1)
    index_mode: str = flag("flat", "exact search, or Faiss", choices=("flat", "faiss"))
    faiss_index_type: str = flag("flat", "flat, ivfflat, ivfsq, ivfpq, pq, or a Faiss factory string like OPQ64,PQ64")
    faiss_code_size: int | None = flag(None, "bytes per passage of pq and ivfpq; must divide the dimension", least=1)
    load_index_path: str | None = flag(None, "open this saved index, ours or published, instead of building one")
    allow_other_index: bool = flag(False, "search a saved index although another passage encoder made it")
    save_index_path: str | None = flag(
        None, "save the index here after every build; embeddings that it or a killed build left here are not made again"
    )
    save_index_n_shards: int = flag(128, "accepted for compatibility: our format has no shards", least=1)
    faiss_nlist: int | None = flag(None, "lists of an ivf index (square root of the number of passages)", least=1)
    faiss_nprobe: int | None = flag(
        None,
        "lists of an ivf index searched per query (1 in 32, at least 16: of 640 lists these find 93 % of the best "
        "passages, 1 in 8 99 %; --faiss_nlist or more: all)",
        least=1,
    )
    faiss_train_size: int | None = flag(None, "rows the quantizer is trained on (256 per centroid)", least=1)
    faiss_retrain: bool = flag(False, "train the quantizer again at every refresh")
    refine_factor: int = flag(
        1, "rescore this many times k candidates of a compressed index with their embeddings", least=1
    )
    save_index_codes_only: bool = flag(False, "save a compressed index without its embeddings")
    refresh_index: str = flag("-1", "-1: only at the start; N: every N steps; a-b:r,...: every r steps in [a, b)")
    cache_passage_tokens: str = flag(
        "auto",
        "token ids of the corpus, kept beside it in .atlas-cache, so that it is tokenized only once. on: read and keep "
        "them; off: neither; auto: read them, and keep them where the index of a large corpus is refreshed",
        choices=("auto", "on", "off"),
    )
    bm25_weight: float = flag(
        0.0,
        "rank passages by BM25 as well, with this weight against the embeddings; 0: not at all, 1: by BM25 alone",
        least=0,
        most=1,
    )
    bm25_steps: int | None = flag(
        None, "training steps that search with BM25, from the first on; evaluations always do (all)", least=0
    )
    bm25_k1: float = flag(0.9, "BM25: how much repeating a word counts; 0: not at all", least=0, most=1000)
    bm25_b: float = flag(0.4, "BM25: how strongly long passages are discounted; 0: not at all", least=0, most=1)
    bm25_stopwords: str = flag("en", "BM25: en leaves out the commonest English words", choices=("en", "none"))

    @property
    def evaluates_by_embeddings(self) -> bool:
        """Whether an evaluation needs an index of embeddings, or is to save one."""
        return self.bm25_weight < 1 or self.save_index_path is not None

    def bm25_weight_at(self, step: int | None) -> float:
        """The weight of BM25 in a step of training; None: in an evaluation."""
        over = step is not None and self.bm25_steps is not None and step > self.bm25_steps
        return 0.0 if over else self.bm25_weight


@dataclass(frozen=True)
class Model:
    """Reader and retriever"""

    reader_model_type: str | None = flag(
        None, "hub id or local directory: T5 family, or a decoder-only language model; needed unless --retrieve_only"
    )
    retriever_model_path: str = flag("facebook/contriever", "hub id or local directory of a BERT-type encoder")
    retriever_pooling: str | None = flag(
        None, "hidden states to embedding: mean, sum / sqrt(length), or first (its config)", choices=POOLINGS
    )
    retriever_normalize: bool | None = flag(None, "scale embeddings to unit length (its config)")
    retriever_query_prefix: str | None = flag(None, "prefix of every query, such as 'query: ' (its config)", blank=True)
    retriever_passage_prefix: str | None = flag(
        None, "prefix of every passage, such as 'passage: ' (its config)", blank=True
    )
    int8_reader: bool = flag(
        False,
        "evaluate and ask with the reader's matrices in 8 bits: half of the memory of bf16, almost the same answers",
    )
    text_maxlength: int = flag(
        200,
        "tokens of query and passage together, with those that mark start and end; of a passage, for a language model",
        least=3,
    )
    target_maxlength: int | None = flag(None, "tokens per target; unset or -1: no truncation", least=-1)
    n_context: int = flag(1, "passages given to the reader", least=1)
    retriever_n_context: int = flag(
        5, "passages retrieved per query in training; the retriever learns from all", least=1
    )
    rerank_by_reader: int | None = flag(
        None,
        "in evaluations, order this many passages by how likely the reader finds the question behind each (none; 0: "
        "none, whatever the checkpoint says)",
        least=0,
    )
    retrieve_only: bool = flag(False, "evaluate retrieval alone; a reader is loaded for --rerank_by_reader only")
    use_file_passages: bool = flag(False, "read the passages in the data files; no retriever, no index")
    closed_book: bool = flag(False, "no passages: the reader sees the query alone")
    encoder_format: str = flag(
        "{query} title: {title} context: {text}", "reader input, per passage", fields="query title text id section"
    )
    retriever_format: str = flag("{title} {text}", "passage as the retriever embeds it", fields="title text id section")
    reader_prompt_format: str = flag(
        r"{passages}\n\nQuestion: {query}\nAnswer:",
        r"prompt of a decoder-only reader, with \n for a new line; the answer follows",
        fields="passages query",
    )
    passage_format: str = flag(
        r"{title}\n{text}", "passage in that prompt; an empty line is between two", fields="title text id section"
    )
    chat_template: bool = flag(True, "put that prompt into the chat template of the reader's tokenizer, if it has one")
    decoder_format: str | None = flag(None, "target as the reader learns it, with {target}", fields="target")
    decoder_prompt_format: str | None = flag(
        None, "prompt that the decoder continues, may have {query}", fields="query", constant=True
    )
    generation_max_length: int = flag(
        128, "most tokens of an answer, with a start token and what --decoder_prompt_format begins it with", least=1
    )
    generation_min_length: int | None = flag(None, "least tokens of an answer, counted in the same way", least=0)
    generation_num_beams: int = flag(1, "beams; 1: greedy", least=1, most=256)
    generation_length_penalty: float = flag(
        1.0, "exponent of the length that beam scores are divided by", least=-10, most=10
    )

    @property
    def reranked(self) -> int:
        """How many passages the reader puts in order; 0: none."""
        return n if (n := self.rerank_by_reader or 0) > 1 else 0

    @property
    def uses_reader(self) -> bool:
        """Whether anything is read, or judged by the reader."""
        return not self.retrieve_only or self.reranked > 0

    @property
    def retrieves(self) -> bool:
        """Whether passages come from an index."""
        return not (self.closed_book or self.use_file_passages)

    @property
    def tokens_of_a_question(self) -> int:
        """The most there are: of the passages that are read with it, or its own."""
        passages = self.n_context if self.uses_reader and not self.closed_book else 1
        return passages * self.text_maxlength


@dataclass(frozen=True)
class RetrieverTraining:
    """Training the retriever"""

    train_retriever: bool = flag(False, "train the retriever to rank passages as the reader judges them")
    query_side_retriever_training: bool = flag(False, "train the query encoder only; the passage encoder stays frozen")
    gold_score_mode: str = flag("ppmean", "how the reader judges passages", choices=GOLD_SCORE_MODES)
    gold_question_weight: float = flag(
        1.0,
        "--gold_score_mode question: weight of the question's likelihood; that of the answer behind it has the rest",
        least=0,
        most=1,
    )
    in_batch_negatives: bool = flag(
        False, "the passages of the other questions of a step, on all processes, count as useless to a question"
    )
    temperature_gold: float = flag(0.01, "temperature of the reader's scores", above=0)
    temperature_score: float = flag(0.01, "temperature of the retriever's scores", above=0)
    freeze_reader: bool = flag(False, "the reader judges passages and does not learn; the retriever learns alone")
    freeze_retriever_steps: int = flag(-1, "steps before the retriever starts to learn; -1: none", least=-1)
    retrieve_with_rerank: bool = flag(False, "re-embed the retrieved passages with the current encoder and sort again")
    n_to_rerank_with_retrieve_with_rerank: int = flag(128, "passages to re-embed per query", least=1)
    filtering_overretrieve_ratio: int = flag(2, "retrieve this many times k when passages are filtered out", least=1)
    cache_judgements: str | None = flag(
        None, "file that keeps the judgements of a language model that does not learn, for all runs (none)"
    )
    compute_crossattention_stats: bool = flag(False, "log how attention agrees with the gold scores")

    @property
    def trains_query_side(self) -> bool:
        """Whether the query encoder learns alone, apart from the passage encoder."""
        return self.train_retriever and self.query_side_retriever_training

    @property
    def moves_passages(self) -> bool:
        """Whether the passage encoder is meant to learn, so that an index grows old."""
        return self.train_retriever and not self.query_side_retriever_training

    @property
    def needs_answers(self) -> bool:
        """Whether training looks at answers: the reader learns them, or judges passages by them."""
        return not self.freeze_reader or self.judges_by_answers

    @property
    def judges_by_answers(self) -> bool:
        """Whether the answer counts where passages are judged; if not, none need be computed."""
        return self.gold_score_mode != "question" or self.gold_question_weight < 1


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, as the flags of one half describe them."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]  # names of linear layers; empty: all there are


@dataclass(frozen=True)
class Optimisation:
    """Optimisation"""

    total_steps: int = flag(1000, "steps of training", least=1)
    warmup_steps: int = flag(1000, "steps until the learning rate is reached", least=0)
    scheduler: str = flag("cosine", "shape of the learning rate", choices=("linear", "cosine", "fixed"))
    scheduler_steps: int | None = flag(None, "steps of the schedule (--total_steps)", least=1)
    lr: float = flag(1e-4, "learning rate of the reader", least=0)
    lr_retriever: float = flag(1e-5, "learning rate of the retriever", least=0)
    optimizer: str = flag(
        "adamw",
        "adamw8bit: AdamW whose moments are kept in 8 bits; adafactor: what T5 was trained with, its --lr is a share "
        "of the size of the weights (1e-3)",
        choices=("adamw", "adamw8bit", "adafactor"),
    )
    offload_optimizer: bool = flag(False, "keep the optimizer's moments in the CPU's memory between updates of a GPU")
    weight_decay: float = flag(0.1, "weight decay of the optimizer", least=0)
    epsilon: float = flag(1e-6, "AdamW's epsilon", above=0)
    beta2: float = flag(0.999, "AdamW's second beta", least=0, below=1)
    clip: float = flag(1.0, "clip the norm of all gradients together; 0: no clipping", least=0)
    dropout: float = flag(0.1, "dropout of reader and retriever", least=0, below=1)
    alpha: float = flag(1.0, "accepted for compatibility: has no effect")
    accumulation_steps: int = flag(1, "steps whose gradients are averaged before an update", least=1)
    precision: str = flag(
        "fp32",
        "precision of the computation; weights and optimizer stay fp32 (tf32: fp32 products by a GPU's tensor cores)",
        choices=("fp16", "fp32", "bf16", "tf32"),
    )
    lora_rank: int = flag(
        0, "rank of the reader's adapters (LoRA): nothing else of the reader is trained; 0: none", least=0, most=4096
    )
    lora_alpha: int | None = flag(None, "adapters count this much, divided by their rank (twice the rank)", least=1)
    lora_dropout: float = flag(0.0, "dropout of what the adapters read, besides --dropout", least=0, below=1)
    lora_targets: str = flag("all", "linear layers of the reader that get one, as q,v; all: every one in its blocks")
    retriever_lora_rank: int = flag(0, "as --lora_rank, for the query encoder", least=0, most=4096)
    retriever_lora_alpha: int | None = flag(None, "as --lora_alpha, for the query encoder (twice the rank)", least=1)
    retriever_lora_dropout: float = flag(0.0, "as --lora_dropout, for the query encoder", least=0, below=1)
    retriever_lora_targets: str = flag("all", "as --lora_targets, for the query encoder, as query,value")
    frozen_precision: str = flag(
        "fp32", "precision of the matrices that --lora_rank freezes in the reader", choices=("fp32", "bf16")
    )
    shard_optim: bool = flag(False, "shard the optimizer's state over ranks (ZeRO stage 1)")
    shard_grads: bool = flag(False, "shard gradients and weights as well (ZeRO stage 2)")
    use_gradient_checkpoint_reader: bool = flag(False, "recompute the reader's activations: less memory, more time")
    use_gradient_checkpoint_retriever: bool = flag(False, "recompute the retriever's activations")
    gradient_checkpoint_every: int = flag(1, "recompute the activations of every n-th layer only; 1: of all", least=1)
    save_optimizer: bool = flag(False, "keep the optimizer's state in every checkpoint, not only in the latest")
    keep_checkpoints: int | None = flag(None, "keep this many checkpoints (all)", least=1)
    restart: bool = flag(False, "start from scratch although this experiment has a checkpoint, which is set aside")

    def recomputed_layers(self, half: str) -> int:
        """Of the `reader` or the `retriever` every so many layers are recomputed in the backward pass; 0: none."""
        return self.gradient_checkpoint_every if getattr(self, f"use_gradient_checkpoint_{half}") else 0

    def lora(self, half: str) -> Lora | None:
        """The adapters that `reader` or `retriever` (its query encoder) is to be trained by; None: without any."""
        prefix = {"reader": "lora", "retriever": "retriever_lora"}[half]
        rank, alpha, dropout, targets = (
            getattr(self, f"{prefix}_{name}") for name in ("rank", "alpha", "dropout", "targets")
        )
        names = () if targets == "all" else tuple(targets.split(","))
        return Lora(rank, alpha or 2 * rank, dropout, names) if rank else None


@dataclass(frozen=True)
class Tasks:
    """Tasks"""

    task: str | None = flag(None, f"{', '.join(TASK_NAMES)}, or one of your own")
    qa_prompt_format: str = flag("question: {question} answer: <extra_id_0>", "query for a question", fields="question")
    mlm_noise_density: float = flag(0.15, "share of the tokens that mlm masks", above=0, below=1)
    mlm_mean_noise_span_length: float = flag(3.0, "mean tokens per masked span", least=1)
    min_words_per_lm_instance: int | None = flag(None, "skip shorter texts in mlm, lm and section", least=0)
    min_lm_context_ratio: float = flag(0.5, "least share of a text that lm gives as the query", least=0)
    max_lm_context_ratio: float = flag(0.5, "largest share of a text that lm gives as the query", above=0, most=1)
    leave_out_own_passage: bool = flag(
        False,
        "do not retrieve the passage whose id is that of the question (ArguAna, Quora; cloze, mlm, lm, section do)",
    )
    multiple_choice_num_options: int = flag(4, "most options of a question", least=2, most=26)
    multiple_choice_train_permutations: str = flag("single", "orders of the options to train on", choices=PERMUTATIONS)
    multiple_choice_eval_permutations: str = flag("single", "orders to evaluate and average over", choices=PERMUTATIONS)


@dataclass(frozen=True)
class Origin:
    """Where the flags `OF_THE_MODEL` have their values from; without a checkpoint, as all others."""

    checkpoint: Path | None = None
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that the checkpoint says
    given: frozenset[str] = frozenset()  # all flags of the command line
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of all flags, in this script

    def of(self, name: str) -> str:
        """command line, checkpoint or default"""
        return "command line" if name in self.given else "checkpoint" if name in self.saved else "default"

    @contextlib.contextmanager
    def explaining(self, taken_over: Collection[str] = OF_THE_MODEL) -> Iterator[None]:
        """Add a note to a mistake in the block that names a flag whose value is the checkpoint's."""
        try:
            yield
        except (ValueError, OSError) as error:
            named = dict.fromkeys(re.findall(r"--(\w+)", str(error)))
            taken = [f"--{name}" for name in named if name in taken_over and self.of(name) == "checkpoint"]
            if taken:
                comes, the_flag = ("comes", "the flag") if len(taken) == 1 else ("come", "the flags")
                where = f"{' and '.join(taken)} {comes} from the checkpoint {self.checkpoint}"
                error.add_note(f"({where}: give {the_flag} to use another value)")
            raise


@dataclass(frozen=True)
class Config:
    """All flags of a run."""

    run: Run
    index: Index
    model: Model
    retriever_training: RetrieverTraining
    optimisation: Optimisation
    tasks: Tasks
    origin: Origin = dataclasses.field(default=Origin(), compare=False)
    command: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what was typed: script and flags

    @property
    def judges(self) -> bool:
        """Whether the reader says how useful each passage is."""
        return self.retriever_training.train_retriever or self.run.write_evidence

    def sections(self) -> dict[str, dict[str, Any]]:
        """Section -> flag -> value."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}

    def flags(self) -> dict[str, Any]:
        """Flag -> value."""
        return {name: value for section in self.sections().values() for name, value in section.items()}

    def describe(self) -> str:
        """One line per flag: its value, its default where that differs, and in an evaluation where it comes from."""
        lines = []
        for name, value in self.flags().items():
            notes = [self.origin.of(name)] if self.origin.checkpoint and name in OF_THE_MODEL else []
            if value != (default := self.origin.defaults.get(name, FIELDS[name].default)):
                notes.append(f"default: {_show(default)}")
            lines.append(f"{name}: {_show(value)}" + (f"    [{'; '.join(notes)}]" if notes else ""))
        return "\n".join(lines)

    def differences(self, options: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
        """Flag -> (its value here, its value in a checkpoint's options), for those of the names that differ.

        What the options do not say is unknown and does not differ.
        """
        flags = self.flags()
        pairs = {name: (flags[name], options[name]) for name in names if name in flags and name in options}
        return {name: (here, there) for name, (here, there) in pairs.items() if not _same(here, there)}

    def origins(self) -> list[str]:
        """Sentences for the log of an evaluation: which flags of the model come from where."""
        if self.origin.checkpoint is None:
            return []
        flags, differing = self.flags(), self.differences(self.origin.saved, self.origin.given)
        of = {source: [name for name in OF_THE_MODEL if self.origin.of(name) == source] for source in SOURCES}
        taken = [f"--{name} {say(flags[name])}" for name in of["checkpoint"] if flags[name] != FIELDS[name].default]
        given = [
            f"--{name} {say(flags[name])}"
            + (f" (the checkpoint's: {say(differing[name][1])})" if name in differing else "")
            for name in of["command line"]
        ]
        lines = [f"From the checkpoint {self.origin.checkpoint}: {', '.join(taken) or 'no flag but defaults'}"]
        lines += [f"From the command line: {', '.join(given)}"] if given else []
        unknown = ", ".join(f"--{name}" for name in of["default"])
        return lines + ([f"By default, as the checkpoint does not say them: {unknown}"] if unknown else [])


SECTIONS: dict[str, type] = {
    "run": Run,
    "index": Index,
    "model": Model,
    "retriever_training": RetrieverTraining,
    "optimisation": Optimisation,
    "tasks": Tasks,
}
FIELDS: dict[str, dataclasses.Field] = {
    field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)
}
# What a saved run is asked with: all that is not about training, about its files, or about one command.
TO_ASK = {field.name for section in (Index, Model, RetrieverTraining, Tasks) for field in dataclasses.fields(section)}
TO_ASK -= {"train_retriever", "save_index_path", "save_index_codes_only", "allow_other_index", "cache_judgements"}
TO_ASK |= {"seed", "bad_lines", "precision", "embedder_precision", "per_gpu_batch_size", "per_gpu_eval_batch_size"}
TYPES: dict[str, Any] = {name: kind for section in SECTIONS.values() for name, kind in get_type_hints(section).items()}
SOURCES = ("command line", "checkpoint", "default")


def sentence(error: Exception) -> str:
    """What an error says, with its notes; of one that names a file, first the file."""
    named = isinstance(error, OSError) and error.filename is not None and error.strerror
    said = f"{error.filename}: {error.strerror}" if named else str(error)
    return " ".join([said, *getattr(error, "__notes__", ())])


def say(value: Any) -> str:
    """A flag's value as a part of a sentence."""
    if value is None or value == ():
        return "unset" if value is None else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = _show(value)
    return f"'{text}'" if isinstance(value, str) and (not text or " " in text) else text


def evaluation_name(path: str) -> str:
    """What the results of an evaluation file are called after: its name without `.jsonl` and `.gz`."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def refresh_schedule(text: str) -> Callable[[int], bool]:
    """When `--refresh_index` asks for a new index: `-1`, `N`, or `a-b:r,c-d:r2`, as a function of the steps finished.

    Raises:
        ValueError: the text is none of these.
    """
    if text.strip() == "-1":
        return lambda step: step == 0
    if re.fullmatch(r"\s*[1-9]\d*\s*", text):
        every = int(text)
        return lambda step: step % every == 0
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)-(\d+):([1-9]\d*)\s*", part)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"--refresh_index {text!r}: expected -1 (only at the start), a number of steps above 0, "
                "or ranges such as 0-100:10,100-1000:50"
            )
        ranges.append(tuple(map(int, found.groups())))
    return lambda step: step == 0 or any(a <= step < b and (step - a) % every == 0 for a, b, every in ranges)


def _show(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _same(here: Any, there: Any) -> bool:
    """Whether a flag's value equals one from a file, where True is not 1."""
    return here == there and isinstance(here, bool) == isinstance(there, bool)
