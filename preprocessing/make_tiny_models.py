"""Build a tiny untrained reader and retriever with their own tokenizers.

    python preprocessing/make_tiny_models.py --passages demo/data/passages.train.jsonl --output_directory demo/models

`reader` is a T5 v1.1-style encoder-decoder, `retriever` a BERT with mean pooling; both are ordinary `save_pretrained`
directories with their tokenizers, to be pretrained with `train.py`. They have the standard architectures with 3.8
million parameters together, and initial weights from which they learn faster (`copy_start`, `lexical_start`).
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from atlas.files.disk import usual_permissions, writing
from atlas.index.passages import open_passages
from flags import exit_on_user_error

SENTINELS = 100
# Words of queries that are not in the corpus: the tokenizers learn them as whole words.
PROMPT_WORDS = "question: answer: title: context: What Which Who How many do does In which By whom is was ?"
METASPACE = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
CONSTANT_DIMENSIONS = 16  # of the retriever's embeddings: see lexical_start


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def learn_pieces(
    texts: list[str], size: int, splitters: list, normalizer: normalizers.Normalizer | None = None
) -> dict[str, int]:
    """`size` word pieces learned by BPE, with their frequencies, the most frequent first."""
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
    # Punctuation is split off, so that an answer has the same pieces with and without a full stop after it.
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
    # BPE marks a word's first piece (▁), WordPiece marks the others (##). Single characters are added in both forms.
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


# ---- models and their initial weights -------------------------------------------------------------------------------


@torch.no_grad()
def copy_start(reader: T5ForConditionalGeneration, seed: int) -> None:
    """Initial weights with which a small T5 learns to copy in hundreds of steps instead of many thousands.

    Encoder: head 0 attends to the previous token, head 1 to the next one (by relative position), the others to equal
    tokens (same projection for q and k). Decoder: the first head of the cross-attention looks for positions whose
    *previous* token is the current one, as an induction head does (Olsson et al. 2022, arXiv 2209.11895), the others
    look for equal tokens. All of them copy the tokens that they attend to.
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
    """Initial weights that make mean pooling a bag of words weighted by inverse document frequency.

    BERT normalises each token's embedding, so the length of a word vector alone has no effect. Here the token type adds
    a constant in a few separate dimensions. The shorter the vector of a frequent word is, compared with this constant,
    the less of it is left after the normalisation. The last layer norm removes the constant.
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
    signs = torch.tensor([1.0, -1.0]).repeat(CONSTANT_DIMENSIONS // 2)  # mean 0, because the layer norm subtracts it
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
        initializer_range=0.005,  # small weights, so that the layers hardly change the bag of words
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
    directory.mkdir(parents=True, exist_ok=True)
    with usual_permissions(directory / "model.safetensors"):
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
    directory.mkdir(parents=True, exist_ok=True)
    with usual_permissions(directory / "model.safetensors"):
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


def read_texts(passages: Path) -> list[str]:
    """The texts of a corpus file's passages, with their titles and sections."""
    if not passages.exists():
        sys.exit(f"{passages} does not exist; create it with: python preprocessing/prepare_demo.py")
    return [
        f"{row['title']}: {row.get('section') or ''} {row['text']}"
        for row in open_passages([passages], titles_joined=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=Path, default=Path("demo/data/passages.train.jsonl"), help="corpus file")
    parser.add_argument("--output_directory", type=Path, default=Path("demo/models"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {"reader_width": 128, "reader_layers": (3, 2), "retriever_width": 256, "vocabulary_size": 6000}
    with exit_on_user_error(stopped="give the same command again"), writing(arguments.output_directory):
        texts = read_texts(arguments.passages)
        for directory in build_tiny_models(texts, arguments.output_directory, **sizes, seed=arguments.seed):
            print(directory)


if __name__ == "__main__":
    main()
