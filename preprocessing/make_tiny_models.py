"""Build a tiny reader and a tiny retriever for the demo and pretrain them briefly on the CPU.

    python preprocessing/make_tiny_models.py --data demo/data --output_directory demo/models

`reader` is a T5 v1.1-style encoder-decoder, `retriever` a BERT with mean pooling; both are ordinary `save_pretrained`
directories with their tokenizers. Pretraining sees what `prepare_demo.py` wrote about train entities only: never a dev
or test entity, never a question. Both models start from weights that make the first steps count (`copy_start`,
`lexical_start`) and otherwise have the standard architectures.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

QUERY_FORMAT = "question: {query} answer: <extra_id_0>"
READER_FORMAT = "{query} title: {title} context: {text}"
RETRIEVER_FORMAT = "{title} {text}"
TARGET_FORMAT = "<extra_id_0> {answer}"
SENTINELS = 100
# What queries are made of besides the corpus' own words: the tokenizers learn these as whole words.
PROMPT_WORDS = "question: answer: title: context: What Which Who How many do does In which By whom is was ?"
METASPACE = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
CONSTANT_DIMENSIONS = 16  # of the retriever's embeddings: see lexical_start


READER_VOCABULARY, RETRIEVER_VOCABULARY = 8000, 8000
READER_WIDTH, READER_LAYERS = 128, (3, 2)
RETRIEVER_WIDTH, RETRIEVER_LAYERS = 256, 1
RETRIEVER_STEPS_PER_MINUTE = 10


@dataclass(frozen=True)
class ReaderPhase:
    steps_per_minute: int
    batch_size: int
    n_context: int


READER_PHASES = (ReaderPhase(160, 64, 1), ReaderPhase(72, 24, 4))


class Passage(NamedTuple):
    title: str
    text: str

    def for_retriever(self) -> str:
        return RETRIEVER_FORMAT.format(title=self.title, text=self.text)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def learn_pieces(
    texts: list[str], size: int, splitters: list, normalizer: normalizers.Normalizer | None = None
) -> dict[str, int]:
    """The `size` most useful pieces of words, learned by BPE, with their frequencies, the most frequent first."""
    bpe = Tokenizer(models.BPE())
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=["▁"]))
    frequency = Counter(piece for encoding in bpe.encode_batch(texts) for piece in encoding.tokens)
    return {piece: frequency[piece] for piece in sorted(bpe.get_vocab(), key=lambda piece: (-frequency[piece], piece))}


def train_reader_tokenizer(texts: list[str], vocabulary_size: int) -> Tokenizer:
    """A Unigram model in T5's layout: `<pad>` 0, `</s>` 1, `<unk>` 2, sentinels last, `<extra_id_0>` highest."""
    special = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    # Punctuation is kept apart, so that an answer has the same pieces whether a full stop follows it or not.
    splitters = [METASPACE, pre_tokenizers.Punctuation("isolated")]
    pieces = learn_pieces(texts, vocabulary_size - len(special) - len(sentinels), splitters)
    total = sum(pieces.values())
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [(piece, math.log(max(frequency, 0.5) / total)) for piece, frequency in pieces.items()]
    vocabulary += [(token, 0.0) for token in sentinels]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = METASPACE
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + sentinels])
    return tokenizer


def train_retriever_tokenizer(texts: list[str], vocabulary_size: int) -> Tokenizer:
    """BERT's lower-casing WordPiece."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitters = [pre_tokenizers.BertPreTokenizer(), METASPACE]
    pieces = learn_pieces(texts, vocabulary_size - len(special), splitters, normalizer)
    # BPE marks a word's first piece (with ▁), WordPiece marks the others (with ##). Single characters may be either.
    word_pieces = [piece[1:] if piece.startswith("▁") else "##" + piece for piece in pieces]
    word_pieces += [piece for piece in pieces if len(piece) == 1 and piece != "▁"]
    vocabulary = {
        piece: i for i, piece in enumerate(dict.fromkeys(special + [piece for piece in word_pieces if piece]))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def train_tokenizers(texts: list[str], reader_size: int, retriever_size: int) -> tuple[Tokenizer, Tokenizer]:
    """The reader's and the retriever's."""
    texts = texts + [PROMPT_WORDS] * (1 + len(texts) // 50)
    return train_reader_tokenizer(texts, reader_size), train_retriever_tokenizer(texts, retriever_size)


def pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (n, longest); the padding id is 0."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad([encoding.ids for encoding in tokenizer.encode_batch_fast(texts)])


# ---- models as they start -------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_start(reader: T5ForConditionalGeneration, seed: int) -> None:
    """Starting weights from which a small T5 learns to copy in hundreds of steps instead of many thousands.

    Encoder: head 0 attends to the previous token, head 1 to the next one (by relative position), the others to equal
    tokens (same projection for q and k). Decoder: the first head of the cross-attention looks for positions whose
    *previous* token is the current one, as an induction head does (Olsson et al. 2022, arXiv 2209.11895), the others
    for equal tokens; all of them copy what they see.
    """
    generator = torch.Generator().manual_seed(seed)
    width, head_width, heads = reader.config.d_model, reader.config.d_kv, reader.config.num_heads

    def orthonormal_rows() -> torch.Tensor:  # (head_width, width)
        return torch.linalg.qr(torch.randn(width, head_width, generator=generator))[0].T

    rows = [slice(head * head_width, (head + 1) * head_width) for head in range(heads)]
    one_before, one_after = 1, 1 + reader.config.relative_attention_num_buckets // 2  # buckets of relative positions
    bias = reader.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    bias.mul_(0.1)
    bias[one_before, 0] = bias[one_after, 1] = 4.0
    bias[0, 2:] = -4.0  # an equal token elsewhere, not the token itself
    neighbour_in, neighbour_out = orthonormal_rows(), orthonormal_rows()
    for layer, block in enumerate(reader.encoder.block):
        attention = block.layer[0].SelfAttention
        for head in range(2, heads):
            attention.q.weight[rows[head]] = attention.k.weight[rows[head]] = orthonormal_rows() * 0.5
        if layer == 0:
            attention.v.weight[rows[0]] = neighbour_in
            attention.o.weight[:, rows[0]] = 2 * neighbour_out.T
            attention.v.weight[rows[1]] = orthonormal_rows()
            attention.o.weight[:, rows[1]] = 2 * orthonormal_rows().T
    bias = reader.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.mul_(0.1)
    bias[one_before, 0] = 4.0
    for block in reader.decoder.block:
        attention = block.layer[1].EncDecAttention
        for head in range(heads):
            attention.q.weight[rows[head]] = attention.k.weight[rows[head]] = orthonormal_rows() * 0.4
            copied = orthonormal_rows()
            attention.v.weight[rows[head]] = copied
            attention.o.weight[:, rows[head]] = copied.T
        attention.q.weight[rows[0]] = neighbour_in * 0.7
        attention.k.weight[rows[0]] = neighbour_out * 0.7


def build_reader(tokenizer: Tokenizer, width: int, layers: tuple[int, int], seed: int) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=2 * width,
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    reader = T5ForConditionalGeneration(config)
    copy_start(reader, seed)
    return reader


@torch.no_grad()
def lexical_start(retriever: BertModel, tokenizer: Tokenizer, passages: list[str], seed: int) -> None:
    """Starting weights that make mean pooling a bag of words weighted by inverse document frequency.

    BERT normalises each token's embedding, so the length of a word vector alone says nothing. Here the token type adds
    a constant in a few dimensions of its own: what a frequent, short word vector loses to the constant in the
    normalisation is its weight, and the last layer norm blanks the constant out.
    """
    generator = torch.Generator().manual_seed(seed)
    width = retriever.config.hidden_size
    frequency = Counter(token for encoding in tokenizer.encode_batch(passages) for token in set(encoding.ids))
    weight = torch.tensor(
        [math.log(len(passages) / frequency[i]) if frequency[i] else 0.0 for i in range(retriever.config.vocab_size)]
    )
    weight = weight / weight.max()
    embeddings = retriever.embeddings
    words = torch.randn(len(weight), width, generator=generator) * weight[:, None]
    words[:, :CONSTANT_DIMENSIONS] = 0
    embeddings.word_embeddings.weight.copy_(words)
    embeddings.position_embeddings.weight.normal_(0, 0.02, generator=generator)
    embeddings.token_type_embeddings.weight.zero_()
    signs = torch.tensor([1.0, -1.0]).repeat(CONSTANT_DIMENSIONS // 2)  # mean 0, as the layer norm will subtract it
    constant = 0.3 * math.sqrt((width - CONSTANT_DIMENSIONS) / CONSTANT_DIMENSIONS)
    embeddings.token_type_embeddings.weight[:, :CONSTANT_DIMENSIONS] = signs * constant
    retriever.encoder.layer[-1].output.LayerNorm.weight[:CONSTANT_DIMENSIONS] = 0.0


def build_retriever(tokenizer: Tokenizer, passages: list[str], width: int, layers: int, seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=width,
        initializer_range=0.005,  # small layers: the bag of words passes through them unharmed
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        pooling="average",
    )
    retriever = BertModel(config, add_pooling_layer=False)
    lexical_start(retriever, tokenizer, passages, seed)
    return retriever


def save_reader(reader: T5ForConditionalGeneration, tokenizer: Tokenizer, directory: Path) -> None:
    reader.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": SENTINELS,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(SENTINELS)],
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def save_retriever(retriever: BertModel, tokenizer: Tokenizer, directory: Path) -> None:
    retriever.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def build_tiny_models(
    texts: list[str],
    output: Path,
    *,
    reader_width: int = 64,
    reader_layers: tuple[int, int] = (2, 2),
    retriever_width: int = 64,
    retriever_layers: int = 1,
    vocabulary_size: int = 1000,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Untrained models with tokenizers trained on `texts`, saved in `output/reader` and `output/retriever`.

    Returns the two directories. Widths must be divisible by 4 (heads); `vocabulary_size` is approximate for the
    retriever and must leave room for the alphabet of `texts` and 100 sentinels.
    """
    reader_tokenizer, retriever_tokenizer = train_tokenizers(texts, vocabulary_size, vocabulary_size)
    reader = build_reader(reader_tokenizer, reader_width, reader_layers, seed)
    retriever = build_retriever(retriever_tokenizer, texts, retriever_width, retriever_layers, seed)
    save_reader(reader, reader_tokenizer, output / "reader")
    save_retriever(retriever, retriever_tokenizer, output / "retriever")
    return output / "reader", output / "retriever"


# ---- pretraining ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainingData:
    """What may be trained on, read from the files of `prepare_demo.py`."""

    passages: dict[str, Passage]  # by id, without those about dev and test entities
    clozes: list[dict]

    @classmethod
    def read(cls, directory: Path) -> "PretrainingData":
        held_out = {row["id"] for row in read_jsonl(directory / "held_out.jsonl")}
        rows = read_jsonl(directory / "passages.jsonl")
        passages = {
            row["id"]: Passage(f"{row['title']}: {row['section']}", row["text"])
            for row in rows
            if row["id"] not in held_out
        }
        return cls(passages, read_jsonl(directory / "pretrain.jsonl"))


def read_jsonl(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        sys.exit(f"{path} is missing; write it with: python preprocessing/prepare_demo.py")


def queries_of(clozes: list[dict]) -> list[str]:
    return [QUERY_FORMAT.format(query=cloze["query"]) for cloze in clozes]


def embed(retriever: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states over non-padding tokens: (n, L) -> (n, D)."""
    hidden = retriever(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def embed_texts(retriever: BertModel, tokenizer: Tokenizer, texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """(n, D), in batches of texts of similar lengths."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    embeddings = torch.empty(len(texts), retriever.config.hidden_size)
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        embeddings[rows] = embed(retriever, *pad([encoded[i] for i in rows]))
    return embeddings


def entity_batches(clozes: list[dict], batch_size: int, seed: int) -> Iterator[list[dict]]:
    """Batches of clozes about entities of one kind, two about each entity: passages of the same entity on another
    matter, and of other entities on the same matter, are the negatives from which a retriever learns most."""
    random_numbers = random.Random(seed)
    by_kind: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for cloze in clozes:
        kind, entity, _ = cloze["id"].split("-", 2)
        by_kind[kind][entity].append(cloze)
    kinds = list(by_kind)
    weights = [math.sqrt(len(by_kind[kind])) for kind in kinds]
    while True:
        of_kind = by_kind[random_numbers.choices(kinds, weights)[0]]
        entities = random_numbers.choices(list(of_kind), k=batch_size // 2)
        yield [cloze for entity in entities for cloze in random_numbers.sample(of_kind[entity], 2)]


def pretrain_retriever(
    retriever: BertModel,
    tokenizer: Tokenizer,
    data: PretrainingData,
    *,
    steps: int,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 5e-4,
    temperature: float = 0.05,
) -> None:
    """Contrastive training with the batch's other passages as negatives (as DPR, Karpukhin et al. 2020), on the score
    q·p / sqrt(D) of Atlas."""
    random_numbers = random.Random(seed)
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scale = 1 / (temperature * math.sqrt(retriever.config.hidden_size))
    progress = Progress("retriever", steps)
    for step, batch in zip(range(steps), entity_batches(data.clozes, batch_size, seed), strict=False):
        set_learning_rate(optimizer, learning_rate * min(1, (step + 1) / 20) * (1 - step / steps))
        positives = [random_numbers.choice(cloze["passages"]) for cloze in batch]
        queries = embed(retriever, *tokenize(tokenizer, queries_of(batch)))
        keys = embed(retriever, *tokenize(tokenizer, [data.passages[i].for_retriever() for i in positives]))
        scores = queries @ keys.T * scale  # (B, B)
        also_right = torch.tensor([[i in cloze["passages"] for i in positives] for cloze in batch])
        also_right.fill_diagonal_(False)
        scores = scores.masked_fill(also_right, -torch.inf)
        loss = F.cross_entropy(scores, torch.arange(len(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.report(step + 1, loss, (scores.argmax(1) == torch.arange(len(batch))).float().mean())


def choose_distractors(
    retriever: BertModel, tokenizer: Tokenizer, data: PretrainingData, clozes: list[dict], n: int, seed: int
) -> list[list[str]]:
    """For each cloze, the ids of `n` passages that do not hold its answer: about half of them found by the retriever,
    the others random. With either kind alone the reader fails on the other."""
    random_numbers = random.Random(seed)
    ids = list(data.passages)
    embeddings = embed_texts(retriever, tokenizer, [passage.for_retriever() for passage in data.passages.values()])
    queries = embed_texts(retriever, tokenizer, queries_of(clozes))
    distractors = []
    for cloze, row in zip(clozes, (queries @ embeddings.T).topk(4 * n).indices.tolist(), strict=True):
        groups = [ids[i] for i in row], random_numbers.sample(ids, 4 * n)
        wrong = [[i for i in group if cloze["answer"] not in data.passages[i].text][:n] for group in groups]
        distractors.append(random_numbers.sample([*wrong[0], *wrong[1]], n))
    return distractors


def draw_clozes(clozes: list[dict], n: int, random_numbers: random.Random) -> list[dict]:
    """`n` clozes, a relation as often as the square root of its size."""
    by_relation = defaultdict(list)
    for cloze in clozes:
        by_relation[cloze["relation"]].append(cloze)
    relations = list(by_relation)
    weights = [math.sqrt(len(by_relation[relation])) for relation in relations]
    return [
        random_numbers.choice(by_relation[relation]) for relation in random_numbers.choices(relations, weights, k=n)
    ]


def chunks(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def substitute(passages: list[Passage], answer: str, other: str) -> list[Passage]:
    """The passages with the answer, always the end of a sentence, replaced."""
    return [Passage(passage.title, passage.text.replace(f" {answer}.", f" {other}.")) for passage in passages]


def reader_batches(
    data: PretrainingData, clozes: list[dict], distractors: list[list[str]], batch_size: int, seed: int
) -> list[tuple[list[str], list[str]]]:
    """Reader inputs (B·K, one passage after the other) and targets (B): a passage with the answer and the cloze's
    distractors. In half of the examples another answer of the same relation takes the answer's place in passages and
    target, so that nothing can be remembered, only read (knowledge substitution, Longpre et al. 2021)."""
    random_numbers = random.Random(seed)
    answers = defaultdict(list)
    for cloze in clozes:
        answers[cloze["relation"]].append(cloze["answer"])
    examples = []
    for cloze, others in zip(clozes, distractors, strict=True):
        answer = cloze["answer"]
        ids = [random_numbers.choice(cloze["passages"]), *others]
        passages = [data.passages[i] for i in ids]
        if random_numbers.random() < 0.5:
            other = random_numbers.choice(answers[cloze["relation"]])
            passages, answer = substitute(passages, answer, other), other
        random_numbers.shuffle(passages)
        query = QUERY_FORMAT.format(query=cloze["query"])
        inputs = [READER_FORMAT.format(query=query, title=p.title, text=p.text) for p in passages]
        examples.append((inputs, TARGET_FORMAT.format(answer=answer)))
    batches = []
    for pool in chunks(examples, 16 * batch_size):
        pool.sort(key=lambda example: max(map(len, example[0])))  # little padding
        batches += chunks(pool, batch_size)
    random_numbers.shuffle(batches)
    return [([text for inputs, _ in batch for text in inputs], [target for _, target in batch]) for batch in batches]


def use_single_kernels(reader: T5ForConditionalGeneration) -> None:
    """Replace T5's layer norms and GELUs, chains of small operations, by the same functions in one kernel each."""
    for module in list(reader.modules()):
        for name, child in module.named_children():
            if isinstance(child, T5LayerNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif name == "act":
                setattr(module, name, nn.GELU(approximate="tanh"))


def pretrain_reader(
    reader: T5ForConditionalGeneration,
    tokenizer: Tokenizer,
    batches: list[tuple[list[str], list[str]]],
    learning_rate: float = 2e-3,
) -> None:
    """Fusion-in-Decoder training on batches of (inputs, targets), see `reader_batches`."""
    steps = len(batches)
    use_single_kernels(reader)
    reader.train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress("reader", steps)
    for step, (inputs, targets) in enumerate(batches):
        set_learning_rate(optimizer, learning_rate * min(1, (step + 1) / 50, 2 * (1 - step / steps)))
        ids, mask = tokenize(tokenizer, inputs)  # (B·K, L)
        labels, label_mask = tokenize(tokenizer, targets)  # (B, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            encoded = reader.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            decoded = reader.decoder(
                input_ids=reader._shift_right(labels),
                encoder_hidden_states=encoded.reshape(len(targets), -1, encoded.shape[-1]),  # (B, K·L, d)
                encoder_attention_mask=mask.reshape(len(targets), -1),
                use_cache=False,
            ).last_hidden_state
            # Only where there is a label: most of a batch's positions are padding. T5 scales when embeddings are tied.
            logits = reader.lm_head(decoded[label_mask.bool()] * reader.config.d_model**-0.5)
        wanted = labels[label_mask.bool()]
        loss = F.cross_entropy(logits.float(), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.report(step + 1, loss, (logits.argmax(-1) == wanted).float().mean())


def has_fast_bf16() -> bool:
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class Progress:
    """Prints the mean loss and the share of right answers every 50 steps and at the end."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.start, self.values = name, steps, time.monotonic(), []

    def report(self, step: int, loss: torch.Tensor, right: torch.Tensor) -> None:
        self.values.append((loss.item(), right.item()))
        if step % 50 == 0 or step == self.steps:
            mean_loss, mean_right = (sum(column) / len(column) for column in zip(*self.values, strict=True))
            seconds = time.monotonic() - self.start
            values = f"loss: {mean_loss:.3f} | right: {mean_right:.0%} | {seconds:.0f} s"
            print(f"{self.name} {step} / {self.steps} | {values}", flush=True)
            self.values = []


def pretrain(data: PretrainingData, output: Path, minutes: float, seed: int) -> None:
    """Train tokenizers and models on `data` and save them; the number of steps follows from `minutes` alone."""
    random_numbers = random.Random(seed)
    texts = [passage.for_retriever() for passage in data.passages.values()]
    readers_tokenizer, retrievers_tokenizer = train_tokenizers(texts, READER_VOCABULARY, RETRIEVER_VOCABULARY)
    reader = build_reader(readers_tokenizer, READER_WIDTH, READER_LAYERS, seed)
    retriever = build_retriever(retrievers_tokenizer, texts, RETRIEVER_WIDTH, RETRIEVER_LAYERS, seed)
    pretrain_retriever(
        retriever, retrievers_tokenizer, data, steps=round(RETRIEVER_STEPS_PER_MINUTE * minutes), seed=seed
    )
    batches = []
    for phase in READER_PHASES:
        steps = round(phase.steps_per_minute * minutes)
        clozes = draw_clozes(data.clozes, steps * phase.batch_size, random_numbers)
        distractors = choose_distractors(retriever, retrievers_tokenizer, data, clozes, phase.n_context - 1, seed)
        batches += reader_batches(data, clozes, distractors, phase.batch_size, seed)
    pretrain_reader(reader, readers_tokenizer, batches)
    save_reader(reader, readers_tokenizer, output / "reader")
    save_retriever(retriever, retrievers_tokenizer, output / "retriever")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("demo/data"), help="directory written by prepare_demo.py")
    parser.add_argument("--output_directory", type=Path, default=Path("demo/models"))
    parser.add_argument("--minutes", type=float, default=2.5, help="steps of about so many minutes on two cores")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    pretrain(PretrainingData.read(arguments.data), arguments.output_directory, arguments.minutes, arguments.seed)
    print(f"Pretrained in {time.monotonic() - start:.0f} s: {arguments.output_directory}/reader and /retriever")


if __name__ == "__main__":
    main()
