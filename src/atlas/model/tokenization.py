"""Text to token ids and back, exactly as the published models were trained.

transformers 5 drops the lone `▁` before a sentinel (`answer: <extra_id_0>`) and at the end of a text. The published
readers were trained with it, so the reader's pipeline is built here. Worker processes import this file, so torch and
transformers are imported only in the functions that need them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import string
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from tokenizers import __version__ as library_version
from tokenizers.processors import TemplateProcessing

from atlas.model.pretrained import CAUSAL_TYPES, READER_FLAG, RETRIEVER_FLAG, pretrained_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LIBRARY = f"tokenizers {library_version}"
N_SENTINELS = 100
# Characters. Longer texts are cut before they are tokenized: a tokenizer takes 300 bytes and more for each character.
LONGEST_TEXT = 100_000  # a question, an answer
LONGEST_PASSAGE = 10_000_000  # a passage as it is read, and the texts that are tokenized together
SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"  # for chat templates that ask for the date
MARK = re.compile("<pad>|</s>|<unk>|<extra_id_[0-9]+>")
# The rules of transformers' clean_up_tokenization_spaces, in the same order.
CLEAN_UP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")]
CLEAN_UP += [(f" {suffix}", suffix) for suffix in ("n't", "'m", "'s", "'ve", "'re")]


class ReaderTokenizer:
    """T5 tokenizer. Picklable. The tokenizers library encodes batches in parallel.

    Attributes: `pad_id`, `eos_id`, `sentinel_ids` (`sentinel_ids[n]` is the id of `<extra_id_n>`), `fuses` (as
    `atlas.model.interface.Reader` says).

    Raises:
        ValueError: the vocabulary lacks `<pad>`, `</s>` or `<extra_id_0>`.
    """

    fuses = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        for token in ("<pad>", "</s>", "<extra_id_0>"):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"the vocabulary has no {token}, so this is not a T5 tokenizer")
        self.pad_id: int = tokenizer.token_to_id("<pad>")
        self.eos_id: int = tokenizer.token_to_id("</s>")
        ids = (tokenizer.token_to_id(f"<extra_id_{n}>") for n in count())
        self.sentinel_ids: list[int] = list(takewhile(lambda token_id: token_id is not None, ids))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], max_length: int | None = None, eos: bool = True) -> list[list[int]]:
        """Token ids of each text, at most `max_length`. With `eos` the last one is always `</s>`."""
        return _encode(self._tokenizer, texts, max_length, [], [self.eos_id] if eos else [])

    def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """Text of each row of ids, with the spaces before punctuation removed as the published system does."""
        texts = self._tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=skip_special_tokens)
        return [_clean_up(text) for text in texts]

    def save_pretrained(self, directory: Path) -> None:
        """Write tokenizer.json and its config, with which transformers' AutoTokenizer gives the same ids and texts."""
        pipeline = Tokenizer.from_str(self._tokenizer.to_str())
        end = ("</s>", self.eos_id)
        pipeline.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end])
        pipeline.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # T5's own class would build a different pipeline
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": True,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class PromptTokenizer:
    """The tokenizer of a decoder-only language model. Picklable.

    Attributes: as of `ReaderTokenizer`, but there are no sentinels; `eos` (the text of EOS); `chats` (whether it has a
    chat template); `start` (what its own pipeline puts before a text: BOS, or nothing); `positions` (how many tokens
    its model has positions for; None: unknown). Without a pad token that the model has an embedding for, rows are
    padded with EOS, which nobody looks at.

    Args:
        embeddings: how many tokens its model has embeddings for.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or no fast implementation.
    """

    fuses = False

    def __init__(
        self, loaded: PreTrainedTokenizerBase, positions: int | None = None, embeddings: int = sys.maxsize
    ) -> None:
        if loaded.eos_token_id is None:
            raise ValueError("its tokenizer has no end-of-text token (eos_token), so no answer would ever end")
        self._loaded, self._tokenizer = loaded, loaded.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id: int = loaded.eos_token_id
        self.eos: str = loaded.eos_token
        pads = loaded.pad_token_id is not None and loaded.pad_token_id < embeddings
        self.pad_id: int = loaded.pad_token_id if pads else self.eos_id
        self.sentinel_ids: list[int] = []
        self.chats, self.positions = bool(loaded.chat_template), positions
        usual = self._tokenizer.encode("a")
        added = list(takewhile(bool, usual.special_tokens_mask))
        self.start: list[int] = usual.ids[: len(added)]
        special = {token.content for token in loaded.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special | {self.eos}, key=len, reverse=True))))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], max_length: int | None = None, eos: bool = True) -> list[list[int]]:
        """Token ids of each text, at most `max_length`. With `eos` the last one is always EOS; there is no BOS."""
        return _encode(self._tokenizer, texts, max_length, [], [self.eos_id] if eos else [])

    def encode_behind(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it stands behind `before`, which is not part of them.

        Some tokenizers put a space before every text that they are given: here, only where there is one.
        """
        given = self.encode([before], eos=False)[0]
        behind = self.encode([before + text for text in texts], eos=False)
        alone = self.encode(texts, eos=False)
        n = len(given)
        return [row[n:] if row[:n] == given else own for row, own in zip(behind, alone, strict=True)]

    def plain(self, text: str) -> str:
        """A text in which nothing acts as a special token: a space is put into their names."""
        return self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def cut(self, texts: Sequence[str], max_length: int) -> list[str]:
        """The beginning of each text that has at most so many tokens."""
        encodings = [
            one for part in _parts(texts) for one in self._tokenizer.encode_batch(part, add_special_tokens=False)
        ]
        pairs = zip(texts, encodings, strict=True)
        return [text[: found.offsets[max_length - 1][1]] if len(found) > max_length else text for text, found in pairs]

    def count_behind(self, text: str, place: int) -> int:
        """How many tokens of a text end behind its first `place` characters."""
        return sum(end > place for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def chat(self, text: str, answer: str | None = None) -> str:
        """The text as what a user says, up to where the answer begins, without thinking; the same every day.

        With an `answer` up to its end, and with what the template puts behind it.
        """
        said = [{"role": "user", "content": text}]
        said += [] if answer is None else [{"role": "assistant", "content": answer}]
        template = self._loaded.get_chat_template()
        return self._loaded.apply_chat_template(
            said,
            chat_template=SAME_DAY + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=answer is None,
            enable_thinking=False,
        )

    @cached_property
    def before_answer(self) -> tuple[str, str]:
        """The end of every prompt by the chat template, and what this puts between a prompt and an answer."""
        ends = [self.chat(text)[::-1] for text in ("a", "b")]
        end, prompt, whole = os.path.commonprefix(ends)[::-1], self.chat("a"), ""
        with contextlib.suppress(TemplateError):  # the template is for prompts alone
            whole = self.chat("a", answer="b")
        between = whole.removeprefix(prompt).partition("b")[0] if whole.startswith(prompt) else ""
        return end, between if between.isspace() else ""

    def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """Text of each row of ids, without spaces around it."""
        texts = self._tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=skip_special_tokens)
        return [text.strip() for text in texts]

    def save_pretrained(self, directory: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads."""
        self._loaded.save_pretrained(directory)


AnyReaderTokenizer = ReaderTokenizer | PromptTokenizer


class RetrieverTokenizer:
    """BERT tokenizer: `[CLS] … [SEP]`. Picklable. Attribute: `pad_id`."""

    def __init__(self, tokenizer: Tokenizer, pad_id: int, cls_id: int, sep_id: int) -> None:
        self._tokenizer, self.pad_id, self._cls_id, self._sep_id = tokenizer, pad_id, cls_id, sep_id

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, at most `max_length` including `[CLS]` and `[SEP]`."""
        return _encode(self._tokenizer, texts, max_length, [self._cls_id], [self._sep_id])

    def description(self) -> str:
        """All that the token ids of a text depend on but the version of the library."""
        return repr((self._tokenizer.to_str(), self._cls_id, self._sep_id))


def load_reader_tokenizer(name_or_path: str) -> AnyReaderTokenizer:
    """The published T5 pipeline, from `tokenizer.json` or `spiece.model` in a local directory or under a hub id.

    If config.json there is that of a decoder-only language model, it is the tokenizer of that.

    Raises:
        OSError: neither file can be found or read, or it is not a T5 vocabulary.
    """
    from transformers.utils.hub import cached_file  # accepts both a local directory and a hub id

    with pretrained_errors(READER_FLAG, name_or_path, "a T5 tokenizer (tokenizer.json or spiece.model)"):
        causal = _is_causal(cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False))
    if causal:
        return load_prompt_tokenizer(name_or_path)
    with pretrained_errors(READER_FLAG, name_or_path, "a T5 tokenizer (tokenizer.json or spiece.model)"):
        file = cached_file(name_or_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        if file is not None:
            return ReaderTokenizer(_pipeline_of_tokenizer_json(json.loads(Path(file).read_text(encoding="utf-8"))))
        serialized = Path(cached_file(name_or_path, "spiece.model")).read_bytes()
        return ReaderTokenizer(_pipeline_of_sentencepiece(serialized))


def load_prompt_tokenizer(name_or_path: str) -> PromptTokenizer:
    """The tokenizer of a decoder-only language model. Raises: OSError, as `load_reader_tokenizer`."""
    from transformers import AutoConfig, AutoTokenizer

    with pretrained_errors(READER_FLAG, name_or_path, "a language model's tokenizer (tokenizer.json)"):
        of_model = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        loaded = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        return PromptTokenizer(loaded, getattr(of_model, "max_position_embeddings", None), of_model.vocab_size)


def _is_causal(config_file: str | None) -> bool:
    """Whether a config.json is that of a decoder-only language model; what else may be in it is looked at later."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(Path(config_file or "").read_text(encoding="utf-8")).get("model_type") in CAUSAL_TYPES
    return False


def load_retriever_tokenizer(name_or_path: str) -> RetrieverTokenizer:
    """The tokenizer of a BERT-type model in a local directory or under a hub id.

    Raises:
        OSError: it cannot be found or read, or it lacks `[PAD]`, `[CLS]` or `[SEP]`.
    """
    from transformers import AutoTokenizer

    with pretrained_errors(RETRIEVER_FLAG, name_or_path, "a BERT tokenizer (tokenizer.json or vocab.txt)"):
        loaded = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        ids = (loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id)
        if None in ids:
            raise ValueError("it has no padding, [CLS] or [SEP] token")
    tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return RetrieverTokenizer(tokenizer, *ids)


def fill_in(template: str, most: int, /, **fields: Any) -> str:
    """The first `most` characters of `template.format(**fields)`, with the empty text for None.

    It takes no more memory than that, whatever is in the fields and however often the template repeats them.
    """
    longest = 0
    for name, value in fields.items():  # a loop, because this is done for every passage of a corpus
        if not isinstance(value, str):
            fields[name] = value = "" if value is None else str(value)
        longest = max(longest, len(value))
    if len(template) + template.count("{") * longest <= most:
        return template.format(**fields)[:most]
    fields, filled = {name: text[:most] for name, text in fields.items()}, ""
    for piece, _ in pieces_of(template):
        filled += piece.format(**fields)[:most]
        if len(filled) >= most:
            break
    return filled[:most]


def pieces_of(template: str) -> Iterator[tuple[str, str | None]]:
    """The parts of a format string, which are format strings: each with its only field, or None."""
    for literal, field, spec, conversion in string.Formatter().parse(template):
        yield literal.replace("{", "{{").replace("}", "}}"), None
        if field is not None:
            yield f"{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}", field


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids, padded: int64 ids (n, L) and a bool mask (n, L) that is true for real tokens.

    L is the longest row (at least 1), rounded up to `multiple`.
    """
    import torch

    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = -(-max(1, lengths.max(initial=0)) // multiple) * multiple
    mask = np.arange(longest) < lengths[:, None]  # (n, L)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    if lengths.any():
        ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int | None, before: list[int], after: list[int]
) -> list[list[int]]:
    cut = None if max_length is None else max(0, max_length - len(before) - len(after))
    rows = []
    for part in _parts(texts):
        encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        rows += [before + encoding.ids[:cut] + after for encoding in encodings]
    return rows


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts that follow one another and together are not too long for the memory; nearly always all of them."""
    part, length = [], 0
    for text in texts:
        if part and length + len(text) > LONGEST_PASSAGE:
            yield part
            part, length = [], 0
        part.append(text)
        length += len(text)
    if part:
        yield part


def _clean_up(text: str) -> str:
    for before, after in CLEAN_UP:
        text = text.replace(before, after)
    return text


def _pipeline_of_tokenizer_json(saved: dict) -> Tokenizer:
    """The pipeline with the file's vocabulary and normalization, but the published handling of spaces."""
    pre_tokenizers = _members(saved.get("pre_tokenizer"), "pretokenizers")
    return _published_pipeline(
        model=saved.get("model", {}),
        added_tokens={token["content"]: token["id"] for token in saved.get("added_tokens", [])},
        normalizers=_members(saved.get("normalizer"), "normalizers"),
        pre_tokenizers=[part for part in pre_tokenizers if part["type"] not in ("WhitespaceSplit", "Metaspace")],
    )


def _pipeline_of_sentencepiece(serialized: bytes) -> Tokenizer:
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        proto = ModelProto.FromString(serialized)
    except DecodeError as error:
        raise ValueError("spiece.model is not a sentencepiece model") from error
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise ValueError("its sentencepiece model is not a Unigram model")
    pieces = [[piece.piece, piece.score] for piece in proto.pieces]
    # The sentinels have the last ids, and <extra_id_0> the very last one.
    pieces += [[f"<extra_id_{n}>", 0.0] for n in reversed(range(N_SENTINELS))]
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    return _published_pipeline(
        model={"type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "vocab": pieces, "byte_fallback": False},
        added_tokens={},
        normalizers=[{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else [],
        pre_tokenizers=[],
    )


def _published_pipeline(
    model: dict, added_tokens: dict[str, int], normalizers: list[dict], pre_tokenizers: list[dict]
) -> Tokenizer:
    """`added_tokens` are those besides the sentinels and special tokens of the vocabulary, token -> id."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    one_space = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    decoders = [{"type": "ByteFallback"}] if model.get("byte_fallback") else []
    # Not stripping spaces around added tokens keeps the lone ▁ before a sentinel.
    # Sentinels are always cut out of the text first. As ordinary pieces they would get a ▁ before them.
    added_tokens = _marks(model.get("vocab")) | added_tokens
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pipeline = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": token, **flags} for token, token_id in added_tokens.items()],
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, one_space]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace, *pre_tokenizers]},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, metaspace]},
        "model": model,
    }
    try:
        return Tokenizer.from_str(json.dumps(pipeline))
    except Exception as error:  # the only class the tokenizers library raises
        raise ValueError(f"its vocabulary is damaged: {error}") from error


def _marks(vocabulary: dict[str, int] | list[list] | None) -> dict[str, int]:
    """The ids of the sentinels and special tokens of a vocabulary: pieces with ids, or with scores in order of ids."""
    ids = vocabulary if isinstance(vocabulary, dict) else {}
    if isinstance(vocabulary, list):
        with contextlib.suppress(TypeError, IndexError):  # the tokenizers library says what is wrong with it
            ids = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
    return {piece: token_id for piece, token_id in ids.items() if isinstance(piece, str) and MARK.fullmatch(piece)}


def _members(part: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer: none, the one, or those of a sequence."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]
