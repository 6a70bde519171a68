"""The retriever: Contriever (Izacard et al. 2022), a BERT whose mean hidden state is the embedding of a text.

Other BERT encoders differ in how they pool the hidden states, in unit length, and in what they want to be put before
queries and passages (E5, BGE, sentence-transformers' models): settings in their config.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel

from atlas.model.pretrained import pretrained_errors, quiet_loading, set_dropout

FLAG = "--retriever_model_path"
POOLINGS = ("average", "sqrt", "cls")
SETTINGS: dict[str, Any] = {  # keys of ours in a BERT's config, with their defaults
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
    """BERT without pooler. Its config may have the keys of `SETTINGS`; it has them all afterwards.

    Raises:
        ValueError: `pooling` is not one of average, sqrt, cls, or another key is of the wrong type.
    """

    def __init__(self, config: BertConfig) -> None:
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
    `max_length` (most tokens of a text), `query_prefix`, `passage_prefix` (what belongs before the texts it is given).
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

    `weights=False` reads only the config and starts from random weights; `dropout=None` keeps the config's. The
    `SETTINGS` are taken from `overrides` (what the user wants, the config that a checkpoint's weights came with), then
    from the config.json, then from the files of a local sentence-transformers directory.

    Raises:
        OSError: nothing there, the hub cannot be reached, not a BERT, or weights that do not fill the model.
    """
    with pretrained_errors(FLAG, name_or_path, "a BERT encoder (config.json and weights)"), quiet_loading(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "bert":
            raise ValueError(f"its config.json says model_type {config.model_type}, not bert")
        found = SETTINGS | _sentence_settings(Path(name_or_path)) | config.to_dict() | dict(overrides or {})
        for key in SETTINGS:
            setattr(config, key, found[key])
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


def _sentence_settings(directory: Path) -> dict[str, Any]:
    """What the files of a sentence-transformers directory say of `SETTINGS`; nothing for any other directory.

    Raises:
        ValueError: they are damaged, or there is a step after the BERT that is neither pooling nor normalization.
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
        raise ValueError(f"its modules.json, or a file that this names, cannot be read: {error!r}") from error
    if unknown := paths.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"its modules.json asks for {', '.join(sorted(unknown))}, which this retriever does not have")
    settings = {"pooling": SENTENCE_POOLINGS.get(mode, mode), "normalize": "Normalize" in paths}
    return settings | {key: prefix for key, prefix in prefixes.items() if prefix}


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


def fingerprint(encoder: Contriever) -> str:
    """A short hash of what makes a passage's embedding, the same on every device.

    Of the weights: names, shapes, a sample and a sum of all bits. Of the settings: those that are not the defaults; the
    query prefix is none of them, an index stays what it is when that is changed.
    """
    digest = hashlib.sha256()
    for key, default in SETTINGS.items():
        if key != "query_prefix" and (value := getattr(encoder.config, key)) != default:
            digest.update(f"{key} {value!r}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        bits = tensor.detach().float().flatten().view(torch.int32)
        sample = bits[:: max(1, bits.numel() // 64)]
        # integer sums, because floating-point ones depend on the number of threads
        digest.update(f"{name} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64).item()} {sample.tolist()}".encode())
    return digest.hexdigest()[:16]
