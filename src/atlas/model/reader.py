"""The reader: T5 as a Fusion-in-Decoder (Izacard & Grave 2021). A T5 state dict is a reader state dict, key for key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, EncoderDecoderCache, LogitsProcessor, T5Config, T5ForConditionalGeneration
from transformers.activations import NewGELUActivation
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5 import modeling_t5 as t5

from atlas.model.causal import CausalReader, load_causal
from atlas.model.grouping import encode_by_length
from atlas.model.inputs import Inputs
from atlas.model.losses import IGNORE
from atlas.model.pretrained import (
    CAUSAL_TYPES,
    READER_FLAG,
    check_fit,
    check_sizes,
    checkpoint_activations,
    difference,
    pretrained_errors,
    quiet_loading,
    set_dropout,
)

ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # other names of `shared.weight`


class FusionInDecoder(T5ForConditionalGeneration):
    """T5 whose encoder reads each passage separately and whose decoder attends to all of them at once."""

    fuses, inputs = True, Inputs

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) in FASTER:
                module.__class__ = FASTER[type(module)]
            if isinstance(getattr(module, "act", None), NewGELUActivation):
                module.act = nn.GELU(approximate="tanh")

    def encode(self, ids: Tensor, mask: Tensor, lengths: np.ndarray | None = None) -> Tensor:
        """Encode every passage independently; the hidden states of a query's passages are concatenated.

        Args:
            ids, mask: (B, K, L).
            lengths: (B, K) tokens of each passage, on the CPU: passages of similar length are encoded together. None
                encodes all in one call, as ranks must that share the reader's weights.

        Returns:
            (B, K·L, d).
        """
        lengths = None if lengths is None else lengths.ravel()
        hidden = encode_by_length(self._encode_rows, ids.flatten(0, 1), mask.flatten(0, 1), lengths)
        return hidden.view(ids.shape[0], -1, hidden.shape[-1])  # (B·K, L, d) -> (B, K·L, d)

    def _encode_rows(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, L, d)
        return self.encoder(input_ids=ids, attention_mask=_broadcastable(mask))[0]

    def logits(
        self, hidden: Tensor, mask: Tensor, decoder_ids: Tensor, *, decoder_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token at each decoder position: (B, S, d), (B, S), (B, T) -> (B, T, V).

        Args:
            mask: (B, S), or (B, T, S) if the decoder's positions attend to different hidden states.
            decoder_mask: (B or 1, T, T), the positions that each position attends to; None: causal.
        """
        return self(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=None if decoder_mask is None else _broadcastable(decoder_mask),
            use_cache=False,
        ).logits

    @functools.wraps(T5ForConditionalGeneration.forward)  # `generate` reads the signature
    def forward(self, *args, attention_mask: Tensor | None = None, **kwargs):
        """T5's, with masks made 4-D here: for 2-D masks, transformers waits for the device to see what they hide."""
        if attention_mask is not None and attention_mask.dim() < 4:
            attention_mask = _broadcastable(attention_mask)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def write(
        self,
        hidden: Tensor,  # (B, S, d)
        mask: Tensor,  # (B, S)
        *,
        max_length: int,
        min_length: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        prompt: Sequence[Sequence[int]] | None = None,  # B rows
        streamer: BaseStreamer | None = None,
    ) -> list[list[int]]:
        """Generate the tokens of an answer for each row of encoder output, without `</s>`.

        `max_length` and `min_length` include the decoder's start token and the prompt. The decoder is forced to begin
        with the tokens of `prompt`, which are not returned. The `streamer` of a single row without beams is given the
        start token, and then each token as it is chosen.
        """
        rows = self.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            do_sample=False,
            synced_gpus=False,  # ranks generate independently: see `parallel.gathered_weights`
            logits_processor=[ForcedPrompt(prompt, num_beams, hidden.device)] if prompt and any(prompt) else None,
            streamer=streamer,
        ).tolist()
        lengths = [len(tokens) for tokens in prompt] if prompt else [0] * len(rows)
        return [self._answer(row[1 + length :]) for row, length in zip(rows, lengths, strict=True)]

    def _expand_inputs_for_generation(
        self, *, encoder_outputs: BaseModelOutput, attention_mask: Tensor, is_encoder_decoder: bool = True, **inputs
    ):
        """As in transformers, but the beams of an example share its hidden states: `SharedBiasAttention`."""
        input_ids, expanded = super()._expand_inputs_for_generation(is_encoder_decoder=False, **inputs)
        return input_ids, expanded | {"encoder_outputs": encoder_outputs, "attention_mask": attention_mask}

    def _reorder_cache(self, cache: EncoderDecoderCache, beams: Tensor) -> EncoderDecoderCache:
        cache.self_attention_cache.reorder_cache(beams)
        return cache

    @contextmanager
    def reading_twice(self, hidden: Tensor) -> Iterator[None]:
        """Inside the block, keys and values of these hidden states are projected once for two uses of the decoder.

        They are let go layer by layer as the second use takes them, so that none exists twice for long.
        """
        projections = [getattr(block.layer[1].EncDecAttention, name) for block in self.decoder.block for name in "kv"]
        for projection in projections:
            projection.forward = _once_for_two(projection.forward, hidden)
        try:
            yield
        finally:
            for projection in projections:
                del projection.forward

    @contextmanager
    def observing_cross_attention(self, watch: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `watch` with the projections of the decoder's cross-attention whenever it runs inside the block.

        It is called once per layer, in order, with queries (B, heads, T, d_kv), keys and values (B, heads, S, d_kv).
        They are not kept afterwards.
        """
        hooks = []
        for block in self.decoder.block:
            attention, seen = block.layer[1].EncDecAttention, {}

            def keep(name: str, heads: int, seen: dict, module: nn.Module, inputs: object, output: Tensor) -> None:
                seen[name] = output.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

            def show(seen: dict, module: nn.Module, inputs: object, output: object) -> None:
                watch(seen.pop("q"), seen.pop("k"), seen.pop("v"))

            for name in "qkv":
                projection = getattr(attention, name)
                hooks.append(projection.register_forward_hook(partial(keep, name, attention.n_heads, seen)))
            hooks.append(attention.register_forward_hook(partial(show, seen)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load weights by their published names. Raises: ValueError, as `load_reader_state`."""
        load_reader_state(self, state)

    def _answer(self, row: list[int]) -> list[int]:
        end = self.config.eos_token_id
        return row[: row.index(end)] if end in row else row

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of encoder and decoder: nearly all of the weights."""
        return [*self.encoder.block, *self.decoder.block]

    @property
    def has_dropout(self) -> bool:
        """Whether training mode and evaluation mode differ."""
        return any(getattr(module, "p", 0) > 0 for module in self.modules() if isinstance(module, nn.Dropout))

    def tie_output_embeddings(self, tied: bool) -> None:
        """Tie `lm_head` to the input embeddings (T5 v1.0), or make it a separate parameter (v1.1, lm-adapt).

        transformers 5 ties them whatever the config says, so that loading a state dict would overwrite one with the
        other. An `lm_head` that was tied before starts with the values of the input embeddings.
        """
        self._tied_weights_keys = dict.fromkeys(ALIASES, "shared.weight")
        if tied:
            self._tied_weights_keys["lm_head.weight"] = "shared.weight"
            self.lm_head.weight = self.shared.weight
        elif self.lm_head.weight is self.shared.weight:
            self.lm_head.weight = nn.Parameter(self.shared.weight.detach().clone())
        self.all_tied_weights_keys = dict(self._tied_weights_keys)


def token_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B, T)
    """Log-probability (fp32) of each label, zero where the label is -100."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -losses.view_as(labels)


def load_reader(
    name_or_path: str, *, dropout: float | None, weights: bool = True, gradient_checkpointing: int = 0
) -> FusionInDecoder | CausalReader:
    """A reader in evaluation mode, with fp32 parameters, from a local directory or a hub id: a T5, or a language model.

    With `weights=False` only the config is read; the parameters mean nothing until `load_state` fills them (those of a
    T5 are on the meta device). `dropout=None` keeps the config's. `gradient_checkpointing=N` recomputes the activations
    of every N-th layer; 0: of none.

    Raises:
        OSError: the model does not exist, the hub cannot be reached, it is of another kind, or weights are missing.
    """
    with (
        pretrained_errors(READER_FLAG, name_or_path, "a T5 model or a language model (config.json and weights)"),
        quiet_loading(name_or_path),
    ):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if config.model_type not in ("t5", *CAUSAL_TYPES):
            kinds = f"t5 or a decoder-only {', '.join(CAUSAL_TYPES[:-1])} or {CAUSAL_TYPES[-1]}"
            raise ValueError(f"its config.json says model_type {config.model_type}, not {kinds}")
        check_sizes(config)
        if config.model_type in CAUSAL_TYPES:
            reader = load_causal(name_or_path, config, weights)
        elif weights:
            reader, report = FusionInDecoder.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
            if report["missing_keys"] or report["unexpected_keys"]:
                raise ValueError(difference(report["missing_keys"], report["unexpected_keys"], []))
            reader.tie_output_embeddings(reader.lm_head.weight is reader.shared.weight)
        else:
            with torch.device("meta"):
                reader = FusionInDecoder(config)
    if dropout is not None:
        set_dropout(reader, dropout)
    if gradient_checkpointing:
        checkpoint_activations(reader, every=gradient_checkpointing)
    return reader.eval()


def load_reader_state(reader: FusionInDecoder, state: Mapping[str, Tensor]) -> None:
    """Load a T5 state dict, whose names have no `reader.` prefix.

    `lm_head` is tied to `shared` if they are equal or `lm_head` is absent; otherwise it becomes a separate parameter.
    `encoder.embed_tokens` and `decoder.embed_tokens` may be absent. A reader built with `weights=False` takes over the
    tensors themselves, as fp32; otherwise their values are copied.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ.
    """
    state = {name: tensor for name, tensor in state.items() if name not in ALIASES}
    shared, lm_head = state.get("shared.weight"), state.get("lm_head.weight")
    tied = shared is None or lm_head is None or torch.equal(shared, lm_head)
    if tied:
        state.pop("lm_head.weight", None)
    reader.tie_output_embeddings(tied)
    expected = {name: tensor for name, tensor in reader.state_dict().items() if name not in ALIASES}
    if tied:
        del expected["lm_head.weight"]
    check_fit(expected, state)
    assign = reader.shared.weight.is_meta
    reader.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False, assign=assign)
    reader.set_input_embeddings(reader.shared)
    reader.tie_output_embeddings(tied)


class RootMeanSquareNorm(t5.T5LayerNorm):
    """T5's layer norm in one kernel; its result has the precision of the matrix products that follow."""

    def forward(self, hidden: Tensor) -> Tensor:  # (…, d) -> (…, d)
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, weight.shape, weight, self.variance_epsilon).to(_matmul_dtype(hidden))


class FeedForward(t5.T5DenseActDense):
    """T5's, without transformers' conversion to fp32 before `wo`; the dropout is the same."""

    def forward(self, hidden: Tensor) -> Tensor:  # (…, d) -> (…, d)
        return self.wo(self.dropout(self.act(self.wi(hidden))))


class GatedFeedForward(t5.T5DenseGatedActDense):
    """The same for the gated layer of T5 v1.1."""

    def forward(self, hidden: Tensor) -> Tensor:  # (…, d) -> (…, d)
        return self.wo(self.dropout(self.act(self.wi_0(hidden)) * self.wi_1(hidden)))


class SharedBiasAttention(t5.T5Attention):
    """T5 attention that adds the mask to the position bias once, in a stack's first layer, not in every layer.

    transformers passes the first layer's bias on to the others, so it is enough to put the mask into it. At XL size,
    with 40 passages of 384 tokens, each such tensor takes 377 MB. The decoder's causal attention is unchanged.

    In cross-attention, the beams of an example are queries to the same keys and values, which exist once.
    """

    def forward(self, hidden_states: Tensor, mask=None, key_value_states=None, position_bias=None, **kwargs):
        causal = self.is_decoder and key_value_states is None
        if not causal and mask is not None:  # (n, 1, 1 or T, L), true where attention is allowed
            if position_bias is None:
                dtype = _matmul_dtype(hidden_states)
                bias = torch.zeros((), dtype=dtype, device=mask.device)
                if self.has_relative_attention_bias:
                    bias = self.compute_bias(mask.shape[-1], mask.shape[-1], device=mask.device)
                    # Heads come last in memory: fused kernels refuse that, or copy it in every layer.
                    bias = bias.to(dtype).contiguous()
                position_bias = torch.where(mask, bias, torch.finfo(dtype).min)
            mask = None
        shape = hidden_states.shape
        if key_value_states is not None:  # (B·beams, T, d) -> (B, beams·T, d)
            hidden_states = hidden_states.view(len(key_value_states), -1, shape[-1])
        output, *rest = super().forward(hidden_states, mask, key_value_states, position_bias, **kwargs)
        return output.view(shape), *rest


class ForcedPrompt(LogitsProcessor):
    """Forces each row through its prompt, at no cost in beam search: only the prompt's next token can be chosen."""

    def __init__(self, prompt: Sequence[Sequence[int]], num_beams: int, device: torch.device) -> None:
        longest = max(len(row) for row in prompt)
        rows = [[*row, *[IGNORE] * (longest - len(row))] for row in prompt]
        self._tokens = torch.tensor(rows, device=device).repeat_interleave(num_beams, 0)  # (B·beams, longest)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (n, t), (n, V) -> (n, V)
        position = input_ids.shape[1] - 1  # the first token is the decoder's start
        if position >= self._tokens.shape[1]:
            return scores
        tokens = self._tokens[:, position, None]  # (n, 1)
        forced = torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(min=0), 0.0)
        return torch.where(tokens == IGNORE, scores, forced)


# Same parameters, same results, fewer kernels.
FASTER = {
    t5.T5LayerNorm: RootMeanSquareNorm,
    t5.T5DenseActDense: FeedForward,
    t5.T5DenseGatedActDense: GatedFeedForward,
    t5.T5Attention: SharedBiasAttention,
}


def _broadcastable(mask: Tensor) -> Tensor:  # (n, L) -> (n, 1, 1, L), or (n, T, L) -> (n, 1, T, L)
    return mask.bool()[:, None, None] if mask.dim() == 2 else mask.bool()[:, None]


def _once_for_two(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []  # what became of the hidden states, until it is used again

    def projected(states: Tensor) -> Tensor:
        if states is not hidden:
            return project(states)
        if kept:
            return kept.pop()
        kept.append(project(states))
        return kept[0]

    return projected


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
