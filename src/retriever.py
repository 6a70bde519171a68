"""The retriever: Contriever (Izacard et al. 2022), a BERT whose mean hidden state is the embedding of a text."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel

from src.modules import pretrained_errors, quiet_loading, set_dropout

FLAG = "--retriever_model_path"
POOLINGS = ("average", "sqrt", "cls")
CONFIG_KEYS = {"pooling", "normalize", "uncentered_layer_norm"}  # ours, beyond BERT's
TIED, QUERY, PASSAGE = "contriever.", "query_contriever.", "passage_contriever."  # published names


class Contriever(BertModel):
    """BERT without pooler. Its config may have `pooling`, `normalize` and `uncentered_layer_norm`.

    Raises:
        ValueError: `pooling` is not one of average, sqrt, cls.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.pooling: str = getattr(config, "pooling", "average")
        self.normalize: bool = getattr(config, "normalize", False)
        if self.pooling not in POOLINGS:
            raise ValueError(f"its config.json says pooling {self.pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if getattr(config, "uncentered_layer_norm", False):
            use_uncentered_layer_norm(self)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, D) fp32
        """Embeddings of n texts; padding, where `mask` is false, has no part in them.

        Raises:
            ValueError: L is above the number of positions the model knows.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens is too long for the retriever, which knows "
                f"{self.config.max_position_embeddings} positions; lower --text_maxlength"
            )
        if ids.shape[0] == 0:  # a rank without queries; transformers cannot reshape nothing
            return torch.zeros(0, self.config.hidden_size, device=ids.device)
        mask = mask.bool()
        # with a mask of two dimensions transformers would ask the device whether it hides anything
        hidden = super().forward(input_ids=ids, attention_mask=mask[:, None, None])[0].float()  # (n, L, D)
        if self.pooling == "cls":
            embeddings = hidden[:, 0]
        else:
            lengths = mask.sum(1, keepdim=True).clamp(min=1)
            total = hidden.masked_fill(~mask[..., None], 0.0).sum(1)
            embeddings = total / (lengths if self.pooling == "average" else lengths.sqrt())
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings


class DualEncoder(nn.Module):
    """One encoder for queries and passages, or with `query_side` a trained and a frozen one that start equal.

    Attributes: `query_encoder`, `passage_encoder` (the same module when tied), `query_side`, `dim` (embedding size D),
    `max_length` (most tokens of a text).
    """

    def __init__(self, contriever: Contriever, query_side: bool) -> None:
        super().__init__()
        self.query_side = query_side
        self.dim: int = contriever.config.hidden_size
        self.max_length: int = contriever.config.max_position_embeddings
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

    def embed_queries(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, D)
        return self.query_encoder(ids, mask)

    def embed_passages(self, ids: Tensor, mask: Tensor) -> Tensor:  # (n, L), (n, L) -> (n, D)
        return self.passage_encoder(ids, mask)

    def train(self, mode: bool = True) -> DualEncoder:
        """As every module's, but a frozen passage encoder never drops anything out."""
        super().train(mode)
        if self.query_side:
            self.passage_contriever.eval()
        return self


class UncenteredLayerNorm(nn.LayerNorm):
    """The norm of the published retrievers: (x - mean(x)) / sqrt(mean(x²) + eps) · weight + bias."""

    def forward(self, hidden: Tensor) -> Tensor:  # (…, D) -> (…, D) fp32
        scaled = F.rms_norm(hidden.float(), self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias, scaled - scaled.mean(-1, keepdim=True), self.weight)


def use_uncentered_layer_norm(module: nn.Module) -> None:
    """Give every encoder in `module` the published layer norm, its parameters kept; its config remembers."""
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
    gradient_checkpointing: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> DualEncoder:
    """A dual encoder in eval mode and fp32 from a local BERT directory or a hub id.

    `weights=False` reads only the config and starts from random weights; `dropout=None` keeps the config's. Of
    `overrides` (the config that a checkpoint's weights came with) what makes an embedding of hidden states is taken.

    Raises:
        OSError: nothing there, the hub cannot be reached, not a BERT, or weights that do not fill the model.
    """
    with pretrained_errors(FLAG, name_or_path, "a BERT encoder (config.json and weights)"), quiet_loading(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "bert":
            raise ValueError(f"its config.json says model_type {config.model_type}, not bert")
        for key in CONFIG_KEYS & (overrides or {}).keys():
            setattr(config, key, overrides[key])
        if weights:
            contriever, report = Contriever.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys']))}")
        else:
            contriever = Contriever(config)
    if dropout is not None:
        set_dropout(contriever, dropout)
    if gradient_checkpointing:
        contriever.activation_checkpointing_enable({"use_reentrant": False})
    return DualEncoder(contriever, query_side).eval()


def state_is_untied(state: Iterable[str]) -> bool:
    """Whether a retriever's state dict (names without the `retriever.` prefix) has an encoder for each side."""
    return any(name.startswith(QUERY) for name in state)


def load_retriever_state(retriever: DualEncoder, state: Mapping[str, Tensor]) -> None:
    """Copy a published retriever state, tied or untied (names without the `retriever.` prefix); a tied one fills both.

    Raises:
        ValueError: an untied state for a tied encoder; keys missing or unexpected; shapes that differ.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    if retriever.query_side and not state_is_untied(state):
        state = {name.replace(TIED, side, 1): tensor for name, tensor in state.items() for side in (QUERY, PASSAGE)}
    elif not retriever.query_side and state_is_untied(state):
        raise ValueError(
            "these weights have an encoder for queries and another for passages, the retriever has one for both; "
            "use --query_side_retriever_training"
        )
    try:
        retriever.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit the retriever: {' '.join(str(error).split())}") from error


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's weights, the same on every device: names, shapes, a sample and a sum of all bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        bits = tensor.detach().float().flatten().view(torch.int32)
        sample = bits[:: max(1, bits.numel() // 64)]
        # integer sums, because floating-point ones depend on the number of threads
        digest.update(f"{name} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64).item()} {sample.tolist()}".encode())
    return digest.hexdigest()[:16]
