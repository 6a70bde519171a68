"""Both halves of the model from a checkpoint, a hub or a directory, with their tokenizers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from atlas import config
from atlas.checkpoint import HALF_OF, Adapter, Base, Checkpoint
from atlas.model.adapters import (
    adapter_of,
    add_adapters,
    base_of,
    has_adapters,
    lower_frozen,
    merge_saved,
    restore_adapters,
)
from atlas.model.inputs import Inputs
from atlas.model.int8 import round_to_int8
from atlas.model.interface import Reader
from atlas.model.likelihoods import KnownLikelihoods
from atlas.model.reader import load_reader
from atlas.model.retriever import DualEncoder, is_constant, load_retriever, load_retriever_state, state_is_untied
from atlas.model.tokenization import AnyReaderTokenizer, load_retriever_tokenizer
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import shard_weights
from atlas.runtime.tracking import log


@dataclass(frozen=True)
class Model:
    """Reader and retriever, and what makes their tensors from text. A half that the run does without is None."""

    reader: Reader | None
    retriever: DualEncoder | None
    inputs: Inputs
    # Weights that are saved as they were read, by the names of `weights`: a reader that does not learn and computes in
    # 16 bits, the checkpoint's retriever where the run does without it. On other ranks than 0 they may be on "meta".
    as_read: dict[str, torch.Tensor] = field(default_factory=dict)
    unused_retriever_config: dict[str, Any] | None = None
    unused_adapters: dict[str, Adapter] = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)  # of the halves that are not to be saved themselves
    known: KnownLikelihoods | None = None  # of a language model that does not learn, with --cache_judgements

    @classmethod
    def load(
        cls,
        settings: config.Model,
        learning: config.RetrieverTraining,
        optimisation: config.Optimisation,
        checkpoint: Checkpoint | None,
        reader_tokenizer: AnyReaderTokenizer | None,
        device: torch.device,
        *,
        training: bool,
    ) -> Self:
        """Load what the run needs onto the device; weights come from the checkpoint where it has them. Collective.

        Args:
            training: False to evaluate: nothing learns. A reader that does not learn has layers in `--precision`.

        Raises:
            OSError: a model cannot be found or reached, and which flag names it.
            ValueError: the checkpoint's weights do not fit the model, or it lacks a half that is to be evaluated.
        """
        if checkpoint is not None:
            _check_halves(settings, checkpoint, training)
        with distributed.busy():  # ranks may read large files at very different speeds
            reader = retriever = retriever_tokenizer = known = None
            unused, as_read, bases = {}, {}, {}
            if settings.uses_reader:
                loaded = _load_reader(settings, learning, optimisation, checkpoint, device, training)
                reader, bases["reader"], as_read = loaded
                learns = training and not learning.freeze_reader
                known = KnownLikelihoods.open(None if learns else learning.cache_judgements, reader, optimisation)
            if settings.retrieves:
                retriever_tokenizer = load_retriever_tokenizer(settings.retriever_model_path)
                loaded = _load_retriever(settings, learning, optimisation, checkpoint, training)
                retriever, bases["retriever"] = loaded[0].to(device), loaded[1]
            elif checkpoint and checkpoint.holds("retriever"):
                unused, bases["retriever"], whole = _unused_retriever(checkpoint, settings, optimisation)
                as_read |= whole
            reader_config = getattr(reader, "config", None)
            inputs = (reader.inputs if reader is not None else Inputs)(
                settings,
                reader_tokenizer,
                retriever_tokenizer,
                device=device,
                decoder_start_id=getattr(reader_config, "decoder_start_token_id", None) or 0,
                reader_positions=getattr(reader_config, "max_position_embeddings", None),
                retriever=retriever,
            )
        distributed.wait_for_all("loading the model")
        kept = {half: base for half, base in bases.items() if base}
        return cls(reader, retriever, inputs, as_read, **unused, bases=kept, known=known)

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's weights that are to be saved, by their published names, `reader.…` and `retriever.…`."""
        halves = {"reader": self.reader, "retriever": self.retriever}
        own = {
            f"{half}.{name}": parameter.detach()
            for half, module in halves.items()
            if module is not None and half not in self.bases
            for name, parameter in module.named_parameters()
        }
        return own | self.as_read

    def adapters(self) -> dict[str, Adapter]:
        """What is to be saved of the halves with a base, by the names of `checkpoint.HALF_OF`. They may be sharded."""
        models = {"reader": self.reader, "query_encoder": self.retriever and self.retriever.query_encoder}
        with_adapters = {name: model for name, model in models.items() if model is not None and has_adapters(model)}
        own = {name: adapter_of(model, self.bases[HALF_OF[name]]) for name, model in with_adapters.items()}
        return self.unused_adapters | own

    def configs(self) -> dict[str, dict[str, Any]]:
        """`reader` and `retriever` -> what their weights are to be loaded with."""
        configs = {"retriever": self.unused_retriever_config} if self.unused_retriever_config else {}
        if self.reader is not None:
            configs["reader"] = self.reader.config.to_dict()
        if self.retriever is not None:
            configs["retriever"] = self.retriever.passage_encoder.config.to_dict()
        return configs


def _check_halves(settings: config.Model, checkpoint: Checkpoint, training: bool) -> None:
    """Say which half does not come from the checkpoint. Raises: ValueError if one that is to be evaluated does not."""
    if not checkpoint.holds("reader") and not checkpoint.holds("retriever"):
        raise ValueError(f"{checkpoint.path} holds no weights at all: give another --model_path, or none")
    halves = (
        ("reader", settings.uses_reader, "--reader_model_type", settings.reader_model_type),
        ("retriever", settings.retrieves, "--retriever_model_path", settings.retriever_model_path),
    )
    for half, needed, flag, name in halves:
        if checkpoint.holds(half) or not needed:
            continue
        if not training:
            without = {"reader": "--retrieve_only", "retriever": "--closed_book or --use_file_passages"}[half]
            raise ValueError(
                f"{checkpoint.path} holds no {half}, so its answers would be those of another model: evaluate with "
                f"{without}, or give a --model_path that has both halves"
            )
        log.info("%s holds no %s: training starts from that of %s %s", checkpoint.path, half, flag, name)


def _load_reader(
    settings: config.Model,
    learning: config.RetrieverTraining,
    optimisation: config.Optimisation,
    checkpoint: Checkpoint | None,
    device: torch.device,
    training: bool,
) -> tuple[Reader, Base | None, dict[str, torch.Tensor]]:
    """The reader, what it is based on if it is not to be saved itself, and else what is to be saved of it as it is."""
    learns = training and not learning.freeze_reader
    from_checkpoint = checkpoint is not None and bool(checkpoint.reader)
    reader = load_reader(
        settings.reader_model_type,
        dropout=optimisation.dropout if learns else 0.0,
        weights=not from_checkpoint,
        gradient_checkpointing=optimisation.recomputed_layers("reader") if learns else 0,
    )
    if from_checkpoint:
        _load_half(type(reader).load_state, reader, checkpoint.reader, checkpoint)
    lora = optimisation.lora("reader") if learns else None
    name = settings.reader_model_type
    base = _adapt(reader, reader.blocks, "reader", lora, [reader], name, checkpoint)
    stays = training and not learns and _saved_adapter("reader", checkpoint) is None
    if stays and (not from_checkpoint or "reader" in checkpoint.bases):
        base = base_of("reader", [reader], name, checkpoint)  # a reader of a checkpoint is saved again: it may go
    if lora and optimisation.frozen_precision == "bf16":
        lower_frozen(reader, torch.bfloat16)
    dtype = devices.compute_dtype(optimisation.precision)
    if learns and optimisation.shard_grads and distributed.world_size() > 1:
        shard_weights(reader, reader.blocks, device, block_dtype=dtype, forward_methods=("encode",))
        log.info("Each of %d ranks keeps its part of the reader", distributed.world_size())
        return reader, base, {}
    as_read: dict[str, torch.Tensor] = {}
    if not learns:
        reader.requires_grad_(False)
        if settings.int8_reader and not training:
            round_to_int8(reader.blocks)
        if dtype is not None:
            if training and base is None:
                keeps = torch.device("cpu" if distributed.is_main() else "meta")
                as_read = {f"reader.{name}": part.detach().to(keeps) for name, part in reader.named_parameters()}
            # Nothing is learnt: the precision of the computation is enough, and only so much goes to the device.
            for block in reader.blocks:
                block.to(dtype)
    return reader.to(device), base, as_read


def _load_retriever(
    settings: config.Model,
    learning: config.RetrieverTraining,
    optimisation: config.Optimisation,
    checkpoint: Checkpoint | None,
    training: bool,
) -> tuple[DualEncoder, Base | None]:
    """The retriever, and what it is based on if it is not to be saved itself."""
    from_checkpoint = checkpoint is not None and bool(checkpoint.retriever)
    asked = {
        "pooling": settings.retriever_pooling,
        "normalize": settings.retriever_normalize,
        "query_prefix": settings.retriever_query_prefix,
        "passage_prefix": settings.retriever_passage_prefix,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    saved = _saved_adapter("query_encoder", checkpoint)
    untied = from_checkpoint and state_is_untied(checkpoint.retriever)
    retriever = load_retriever(
        settings.retriever_model_path,
        query_side=learning.trains_query_side or untied or saved is not None,
        dropout=optimisation.dropout,
        weights=not from_checkpoint,
        gradient_checkpointing=optimisation.recomputed_layers("retriever"),
        overrides=checkpoint.retriever_config | asked if checkpoint and checkpoint.holds("retriever") else asked,
    )
    if from_checkpoint:
        _load_half(load_retriever_state, retriever, checkpoint.retriever, checkpoint)
    learns = training and learning.train_retriever
    lora = optimisation.lora("retriever") if learns else None
    query_encoder, encoders = retriever.query_encoder, [retriever.query_encoder, retriever.passage_encoder]
    if lora and not untied:
        retriever.share_weights()  # of both; what is trained are adapters
    name = settings.retriever_model_path
    base = _adapt(query_encoder, query_encoder.encoder.layer, "query_encoder", lora, encoders, name, checkpoint)
    if training and optimisation.lora_rank and not learns and not saved:
        base = base_of("retriever", encoders, name, checkpoint)  # it stays as it is and need not be saved
    if not learns:
        retriever.requires_grad_(False)
    return retriever, base


def _unused_retriever(
    checkpoint: Checkpoint, settings: config.Model, optimisation: config.Optimisation
) -> tuple[dict[str, Any], Base | None, dict[str, torch.Tensor]]:
    """What a run that does without the checkpoint's retriever saves of it: fields of `Model`, where it is, or all."""
    base = checkpoint.bases.get("retriever")
    kept = {"unused_retriever_config": checkpoint.retriever_config}
    if base is not None:
        adapter = _saved_adapter("query_encoder", checkpoint)
        return kept | {"unused_adapters": {"query_encoder": adapter} if adapter else {}}, base, {}
    if optimisation.lora_rank:
        return kept, Base(settings.retriever_model_path, str(checkpoint.path.resolve())), {}
    state = {f"retriever.{name}": part for name, part in checkpoint.retriever.items()}
    return kept, None, state


def _saved_adapter(name: str, checkpoint: Checkpoint | None) -> Adapter | None:
    return checkpoint.adapters.get(name) if checkpoint is not None else None


def _adapt(
    model: nn.Module,
    layers: Iterable[nn.Module],
    name: str,
    lora: config.Lora | None,
    encoders: Sequence[nn.Module],
    model_name: str,
    checkpoint: Checkpoint | None,
) -> Base | None:
    """Give a model adapters to train, the checkpoint's if it has any, or else add those to the weights.

    Args:
        layers: the parts of the model whose linear layers can have adapters.
        name: as in `checkpoint.HALF_OF`.
        lora: None if no adapters are trained.
        encoders, model_name: as for `base_of`.

    Returns:
        What the adapters that are trained are saved with.

    Raises:
        ValueError: there are no such layers, or the checkpoint's adapters do not fit.
    """
    if lora is None:
        if checkpoint is not None:
            merge_saved(model, name, encoders, model_name, checkpoint)
        return None
    base = base_of(HALF_OF[name], encoders, model_name, checkpoint)
    flag = {"reader": "lora", "query_encoder": "retriever_lora"}[name]
    of_reader = "SEQ_2_SEQ_LM" if getattr(model, "fuses", False) else "CAUSAL_LM"
    add_adapters(model, layers, lora, flag, task=of_reader if name == "reader" else "FEATURE_EXTRACTION")
    if (saved := _saved_adapter(name, checkpoint)) is not None:
        restore_adapters(model, saved, checkpoint.file(f"{name}_adapter/adapter_model"), flag)
    return base


def _load_half(load: Callable, module: nn.Module, state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    file = checkpoint.file("model")
    others = {name: t.dtype for name, t in state.items() if t.dtype != torch.float32 and not is_constant(name)}
    if wrong := [name for name, dtype in others.items() if not dtype.is_floating_point]:
        raise ValueError(f"{file}: {wrong[0]} is {others[wrong[0]]}, and weights are floating-point numbers")
    if others:
        dtypes = ", ".join(sorted({str(dtype) for dtype in others.values()}))
        log.info("%s: %d weights are converted to fp32 (%s, %s)", file, len(others), dtypes, min(others))
    try:
        load(module, state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
