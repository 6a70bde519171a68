"""A decoder-only language model as the reader: all passages and the question in one prompt, the answer behind it.

transformers' own model is used as it is, under the names that its weights have there.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from atlas.model.pretrained import check_fit, check_memory, difference
from atlas.model.prompts import PromptInputs
from atlas.model.tokenization import load_prompt_tokenizer, pad_rows


class Begun(NamedTuple):
    """Prompts that are computed, and what is to be known of them to go on."""

    logits: Tensor  # (u, 1, V): of the first token behind them
    mask: Tensor  # (u, S) bool, with the padding on the left
    cache: DynamicCache


class ReadTwice(NamedTuple):
    """Prompts that are first followed by given answers, and then by others that are written."""

    hidden: Tensor
    cache: DynamicCache | None = None  # of the prompts without their last tokens


class CausalReader(nn.Module):
    """What makes a reader of one of transformers' language models, which is the other base class of an instance.

    Nothing is computed of a prompt before it is known what is to follow: its "hidden states" are its tokens, (B, S, 1).
    A prompt may be padded anywhere. Padding is not attended to and has no position, so it changes nothing.
    """

    fuses, inputs = False, PromptInputs
    _read_twice: ReadTwice | None = None

    def encode(self, ids: Tensor, mask: Tensor, lengths: np.ndarray | None = None) -> Tensor:
        """The tokens of prompts: (B, K, L) -> (B, K·L, 1)."""
        return ids.flatten(1)[..., None]

    def logits(self, hidden: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
        """Logits of each token of the answers: (B, S, 1), (B, S), (B, T) -> (B, T, V).

        Args:
            decoder_ids: the answers, shifted right by one position. What is first there is not looked at: the prompt's
                last token is in its place.
        """
        ids, mask = _to_the_right(hidden[..., 0], mask)
        answers = decoder_ids[:, 1:]
        ids = torch.cat([ids, answers], dim=1)
        # The last place of a prompt without any token is attended to, so that its logits are finite.
        mask = torch.cat([mask[:, :-1], torch.ones_like(decoder_ids, dtype=torch.bool)], dim=1)
        cache = self._cache_to_keep(hidden)
        logits = self._continued(ids, mask, cache, decoder_ids.shape[1])
        if cache is not None:
            cache.crop(-decoder_ids.shape[1])
            self._read_twice = ReadTwice(hidden, cache)
        return logits

    def begin(self, hidden: Tensor, mask: Tensor) -> Begun:
        """Compute prompts that several answers stand behind: (u, S, 1), (u, S). Without gradients."""
        ids, mask = _to_the_right(hidden[..., 0], mask)
        mask = torch.cat([mask[:, :-1], torch.ones_like(mask[:, :1])], dim=1)  # as in `logits`
        cache = DynamicCache(config=self.config)
        return Begun(self._continued(ids, mask, cache, 1), mask, cache)

    def logits_behind(self, begun: Begun, which: Tensor, decoder_ids: Tensor) -> Tensor:
        """`logits` of answers, (m, T) -> (m, T, V), behind prompts that are begun, (m,) the number of each one's."""
        first, answers = begun.logits[which], decoder_ids[:, 1:]  # (m, 1, V), (m, T - 1)
        if not answers.shape[1]:
            return first
        cache = copy.deepcopy(begun.cache)
        cache.batch_select_indices(which)
        mask = torch.cat([begun.mask[which], torch.ones_like(answers, dtype=torch.bool)], dim=1)
        return torch.cat([first, self._continued(answers, mask, cache, answers.shape[1])], dim=1)

    def _continued(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, last: int) -> Tensor:
        """Logits of the last tokens of ids, (n, T) -> (n, last, V), behind those of the cache; mask: (n, S) of all."""
        return self(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            logits_to_keep=last,
            use_cache=cache is not None,
            **self._with_cache(cache),
        ).logits

    def _with_cache(self, cache: DynamicCache | None) -> dict[str, DynamicCache]:
        """A cache by the name that it has in this version of transformers."""
        if cache is None:
            return {}
        older = "cache" not in signature(self.forward).parameters
        return {"past_key_values" if older else "cache": cache}

    def _cache_to_keep(self, hidden: Tensor) -> DynamicCache | None:
        """An empty cache for prompts that are read twice, if it can be shortened to them afterwards."""
        if self._read_twice is None or hidden is not self._read_twice.hidden:
            return None
        cache = DynamicCache(config=self.config)
        whole = all(type(layer) is DynamicLayer for layer in cache.layers)  # and no window slides over them
        return cache if whole and hidden.shape[1] > 1 else None

    @torch.no_grad()
    def write(
        self,
        hidden: Tensor,  # (B, S, 1)
        mask: Tensor,  # (B, S)
        *,
        max_length: int,
        min_length: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        prompt: Sequence[Sequence[int]] | None = None,  # B rows
        streamer: BaseStreamer | None = None,
    ) -> list[list[int]]:
        """Generate the tokens of an answer behind each prompt, without the one that ends it.

        As with T5, `max_length` and `min_length` include a start token, and what an answer must begin with (`prompt`),
        which is not returned. The `streamer` of a single row without beams is given these, and then each token.
        """
        ids, begun = hidden[..., 0], [len(row) for row in prompt] if prompt else [0] * len(hidden)
        if any(begun):
            more, of_more = (part.to(ids.device) for part in pad_rows(prompt, 0))
            ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, of_more], dim=1)
        twice, self._read_twice = self._read_twice, None
        known = twice is not None and twice.hidden is hidden and num_beams == 1 and not any(begun)
        ids, mask = _to_the_right(ids, mask)
        rows = self.generate(
            **self._with_cache(twice.cache if known else None),
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=max_length - 1 - min(begun),
            min_new_tokens=None if min_length is None else max(0, min_length - 1 - min(begun)),
            num_beams=num_beams,
            length_penalty=length_penalty,
            do_sample=False,
            synced_gpus=False,  # ranks generate independently: see `parallel.gathered_weights`
            streamer=None if streamer is None else _AnswerStreamer(streamer, [0, *(prompt[0] if prompt else ())]),
        )[:, ids.shape[1] :].tolist()
        return [self._answer(row[: max_length - 1 - n]) for row, n in zip(rows, begun, strict=True)]

    @contextmanager
    def reading_twice(self, hidden: Tensor) -> Iterator[None]:
        """Inside the block, `write` goes on behind prompts that `logits` has computed. Beams compute them again."""
        self._read_twice = ReadTwice(hidden)
        try:
            yield
        finally:
            self._read_twice = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers: nearly all of the weights."""
        return list(self.base_model.layers)

    @property
    def has_dropout(self) -> bool:
        """Whether training mode and evaluation mode differ."""
        return any(getattr(module, "attention_dropout", 0) > 0 for module in self.modules())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights by their names in transformers; a matrix that has two names may be there once.

        Raises:
            ValueError: keys are missing or unexpected, or shapes differ.
        """
        expected = dict(self.named_parameters())
        state = {name: part for name, part in state.items() if name in expected or name not in self.state_dict()}
        check_fit(expected, state)
        self.load_state_dict(dict(state), strict=False)

    def _answer(self, row: list[int]) -> list[int]:
        ends = self.generation_config.eos_token_id
        return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


class _AnswerStreamer(BaseStreamer):
    """Passes tokens on, but not the prompt: `first` is in its place."""

    def __init__(self, streamer: BaseStreamer, first: list[int]) -> None:
        self._streamer, self._first = streamer, first

    def put(self, value: Tensor) -> None:
        self._streamer.put(torch.tensor(self._first) if self._first else value)
        self._first = []

    def end(self) -> None:
        self._streamer.end()


def load_causal(name_or_path: str, config: PretrainedConfig, weights: bool) -> CausalReader:
    """A reader as `load_reader` wants it; with `weights=False`, with random weights. Raises: ValueError, OSError."""
    if weights:
        model, report = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            trust_remote_code=False,
        )
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ValueError(difference(report["missing_keys"], report["unexpected_keys"], []))
    else:
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        with torch.device("meta"):
            check_memory(AutoModelForCausalLM.from_config(config, **options, trust_remote_code=False))
        model = AutoModelForCausalLM.from_config(config, **options, trust_remote_code=False)
    tokenizer = load_prompt_tokenizer(name_or_path)
    with contextlib.suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    ends = {tokenizer.eos_id}  # the end that is learnt, and those that the model was trained with
    for settings in (config, model.generation_config):
        of_model = settings.eos_token_id
        ends |= set(of_model if isinstance(of_model, list) else [of_model])
    # What else the model's own generation_config.json says, such as penalties, is not asked for here.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends - {None}), pad_token_id=tokenizer.pad_id)
    kind = type(model)
    model.__class__ = type(kind.__name__, (CausalReader, kind), {})
    return model


def _to_the_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, S), (B, S) -> (B, S), (B, S)
    """Rows with their padding on the left."""
    order = mask.to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
