"""The retriever: Contriever (Izacard et al. 2022), a BERT whose mean hidden state is the embedding of a text.

Other BERT encoders (E5, BGE, sentence-transformers models) differ in pooling, in normalization, and in the prefixes
they expect before queries and passages. These are settings in their config.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atlas.config import POOLINGS
from atlas.model.grouping import encode_by_length
from atlas.model.pretrained import (
    RETRIEVER_FLAG,
    add_weights,
    check_memory,
    check_sizes,
    checkpoint_activations,
    pretrained_errors,
    quiet_loading,
    set_dropout,
)
from atlas.runtime.device import attention_learns_in_fp32

ATTENTION = "atlas_sdpa"  # the name of `fused_attention` in transformers
SETTINGS: dict[str, Any] = {  # keys that this project adds to a BERT's config, with their defaults
    "pooling": "average",
    "normalize": False,  # to unit length
    "query_prefix": "",
    "passage_prefix": "",
    "uncentered_layer_norm": False,
}
SENTENCE_POOLINGS = {  # as sentence-transformers calls them in `pooling_mode`, and in the older `pooling_mode_…: true`
    "cls": "cls",
    "cls_token": "cls",
    "mean": "average",
    "mean_tokens": "average",
    "mean_sqrt_len_tokens": "sqrt",
}
TIED, QUERY, PASSAGE = "contriever.", "query_contriever.", "passage_contriever."  # published names


class Contriever(BertModel):
    """BERT without a pooler. Keys of `SETTINGS` that its config lacks are added with their defaults.

    Raises:
        ValueError: `pooling` is not one of average, sqrt, cls, or a key has the wrong type.
    """

    def __init__(self, config: BertConfig) -> None:
        config._attn_implementation = ATTENTION
        super().__init__(config, add_pooling_layer=False)
        for key, default in SETTINGS.items():
            value = getattr(config, key, default)
            if type(value) is not type(default):
                raise ValueError(f"its config says {key} {value!r}; it must be a {type(default).__name__}")
            setattr(config, key, value)
        self.pooling: str = config.pooling
        self.normalize: bool = config.normalize
        if self.pooling not in POOLINGS:
            raise ValueError(f"its config says pooling {self.pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if config.uncentered_layer_norm:
            use_uncentered_layer_norm(self)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, D) fp32
        """Embeddings of n texts. Padding, where `mask` is false, does not affect them.

        Raises:
            ValueError: L exceeds the number of positions of the model.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens is too long for the retriever, which has "
                f"{self.config.max_position_embeddings} positions; lower --text_maxlength"
            )
        if ids.shape[0] == 0:  # a rank without queries; transformers cannot reshape an empty batch
            return torch.zeros(0, self.config.hidden_size, device=ids.device)
        mask = mask.bool()
        # For a 2-D mask, transformers would wait for the device to see whether it hides anything.
        hidden = super().forward(input_ids=ids, attention_mask=mask[:, None, None])[0].float()  # (n, L, D)
        if self.pooling == "cls":
            embeddings = hidden[:, 0]
        else:
            lengths = mask.sum(1, keepdim=True).clamp(min=1)
            total = hidden.masked_fill(~mask[..., None], 0.0).sum(1)
            embeddings = total / (lengths if self.pooling == "average" else lengths.sqrt())
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings


class DualEncoder(nn.Module):
    """One encoder for queries and passages or, with `query_side`, a trained query and a frozen passage encoder.

    Two encoders start with the same weights.

    Attributes: `query_encoder`, `passage_encoder` (the same module when tied), `query_side`, `dim` (embedding size D),
    `max_length` (most tokens of a text), `query_prefix`, `passage_prefix` (to be put before the texts).
    """

    def __init__(self, contriever: Contriever, query_side: bool) -> None:
        super().__init__()
        self.query_side = query_side
        self.dim: int = contriever.config.hidden_size
        self.max_length: int = contriever.config.max_position_embeddings
        self.query_prefix: str = contriever.config.query_prefix
        self.passage_prefix: str = contriever.config.passage_prefix
        if query_side:
            self.query_contriever = contriever
            self.passage_contriever = copy.deepcopy(contriever).requires_grad_(False).eval()
        else:
            self.contriever = contriever

    @property
    def query_encoder(self) -> Contriever:
        return self.query_contriever if self.query_side else self.contriever

    @property
    def passage_encoder(self) -> Contriever:
        return self.passage_contriever if self.query_side else self.contriever

    def share_weights(self) -> None:
        """Let the weights of both encoders exist once: they must be equal, and frozen in both."""
        for name, weight in self.passage_encoder.named_parameters():
            place, _, last = name.rpartition(".")
            setattr(self.query_encoder.get_submodule(place), last, weight)

    def embed_queries(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, D)
        return self.query_encoder(ids, mask)

    def embed_passages(self, ids: Tensor, mask: Tensor, lengths: np.ndarray | None = None) -> Tensor:
        """(n, L), (n, L) -> (n, D). With `lengths` (n,) on the CPU, rows of similar length are encoded together."""
        return encode_by_length(self.passage_encoder, ids, mask, lengths)

    def train(self, mode: bool = True) -> DualEncoder:
        """As for every module, but a frozen passage encoder stays in evaluation mode."""
        super().train(mode)
        if self.query_side:
            self.passage_contriever.eval()
        return self


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, (n, H, L, d) -> (n, L, H, d), in fp32 where the device has its gradients faster so."""
    learns = torch.is_grad_enabled() and query.requires_grad
    if not (learns and attention_learns_in_fp32(query)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast(query.device.type, enabled=False):
        parts = query.float(), key.float(), value.float()
        return sdpa_attention_forward(module, *parts, attention_mask, **options)[0].to(query.dtype), None


AttentionInterface.register(ATTENTION, fused_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class UncenteredLayerNorm(nn.LayerNorm):
    """The layer norm of the published retrievers: (x - mean(x)) / sqrt(mean(x²) + eps) · weight + bias."""

    def forward(self, hidden: Tensor) -> Tensor:  # (…, D) -> (…, D), as precise as the weights
        scaled = F.rms_norm(hidden.float(), self.normalized_shape, eps=self.eps)
        centered = scaled - scaled.mean(-1, keepdim=True)
        return torch.addcmul(self.bias.float(), centered, self.weight.float()).to(self.weight.dtype)


def use_uncentered_layer_norm(module: nn.Module) -> None:
    """Switch every encoder in `module` to the published layer norm, keep the parameters, and note it in the config."""
    for child in module.modules():
        if type(child) is nn.LayerNorm:
            child.__class__ = UncenteredLayerNorm
        elif isinstance(child, Contriever):
            child.config.uncentered_layer_norm = True


def load_retriever(
    name_or_path: str,
    *,
    query_side: bool,
    dropout: float | None,
    weights: bool = True,
    gradient_checkpointing: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> DualEncoder:
    """A dual encoder in evaluation mode and fp32, from a local BERT directory or a hub id.

    `weights=False` reads only the config and starts from random weights; `dropout=None` keeps the config's.
    `gradient_checkpointing=N` recomputes the activations of every N-th layer; 0: of none. Each of the
    `SETTINGS` comes from `overrides` (the user's flags, the config saved with a checkpoint), else from config.json,
    else from the files of a local sentence-transformers directory, else it has its default.

    Raises:
        OSError: the model does not exist, the hub cannot be reached, it is not a BERT, or weights are missing.
    """
    with (
        pretrained_errors(RETRIEVER_FLAG, name_or_path, "a BERT encoder (config.json and weights)"),
        quiet_loading(name_or_path),
    ):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if config.model_type != "bert":
            raise ValueError(f"its config.json says model_type {config.model_type}, not bert")
        check_sizes(config)
        settings = SETTINGS | _sentence_settings(Path(name_or_path)) | config.to_dict() | dict(overrides or {})
        for key in SETTINGS:
            setattr(config, key, settings[key])
        if weights:
            contriever, report = Contriever.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"its weights have no {', '.join(sorted(report['missing_keys']))}")
        else:
            with torch.device("meta"):
                check_memory(Contriever(config))
            contriever = Contriever(config)
    if dropout is not None:
        set_dropout(contriever, dropout)
    if gradient_checkpointing:
        checkpoint_activations(contriever, every=gradient_checkpointing)
    return DualEncoder(contriever, query_side).eval()


def _sentence_settings(directory: Path) -> dict[str, Any]:
    """The `SETTINGS` found in the files of a sentence-transformers directory; empty for any other directory.

    Raises:
        ValueError: the files are damaged, or the model has a step that is neither BERT, pooling nor normalization.
    """
    if not (directory / "modules.json").is_file():
        return {}

    def read(name: str) -> Any:
        return json.loads((directory / name).read_text(encoding="utf-8"))

    try:
        paths = {module["type"].rpartition(".")[2]: module["path"] for module in read("modules.json")}
        pooling = read(f"{paths['Pooling']}/config.json")
        old = "pooling_mode_"
        modes = [key.removeprefix(old) for key, on in pooling.items() if key.startswith(old) and on]
        mode = str(pooling.get("pooling_mode") or " + ".join(modes))
        more = "config_sentence_transformers.json"
        prompts = (read(more).get("prompts") if (directory / more).is_file() else None) or {}
        prefixes = {"query_prefix": prompts.get("query"), "passage_prefix": prompts.get("document")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its modules.json, or a file named there, cannot be read: {error!r}") from error
    if unknown := paths.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"its modules.json lists {', '.join(sorted(unknown))}, which this project does not support")
    settings = {"pooling": SENTENCE_POOLINGS.get(mode, mode), "normalize": "Normalize" in paths}
    return settings | {key: prefix for key, prefix in prefixes.items() if prefix}


def state_is_untied(state: Iterable[str]) -> bool:
    """Whether a state dict (names without the `retriever.` prefix) has separate query and passage encoders."""
    return any(name.startswith(QUERY) for name in state)


def is_constant(name: str) -> bool:
    """Whether this entry of a state dict is no weight: older versions saved the numbers of the positions as well."""
    return name.endswith("embeddings.position_ids")


def load_retriever_state(retriever: DualEncoder, state: Mapping[str, Tensor]) -> None:
    """Copy a retriever's state dict (names without the `retriever.` prefix). A tied one fills both encoders.

    Raises:
        ValueError: the state has two encoders and the retriever one; keys are missing or unexpected; shapes differ.
    """
    state = {name: tensor for name, tensor in state.items() if not is_constant(name)}
    if retriever.query_side and not state_is_untied(state):
        state = {name.replace(TIED, side, 1): tensor for name, tensor in state.items() for side in (QUERY, PASSAGE)}
    elif not retriever.query_side and state_is_untied(state):
        raise ValueError(
            "these weights have separate encoders for queries and passages, but the retriever has one for both; "
            "use --query_side_retriever_training"
        )
    try:
        retriever.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit the retriever: {' '.join(str(error).split())}") from error


def fingerprint(encoder: Contriever) -> str:
    """A short hash of everything that determines a passage's embedding, the same on every device.

    It covers names, shapes, a sample and a checksum of the weights, and the settings that differ from their defaults.
    The query prefix is left out: changing it does not change the passages' embeddings.
    """
    digest = hashlib.sha256()
    for key, default in SETTINGS.items():
        if key != "query_prefix" and (value := getattr(encoder.config, key)) != default:
            digest.update(f"{key} {value!r}".encode())
    add_weights(digest, encoder.state_dict())
    return digest.hexdigest()[:16]
