"""Both halves of the model from a checkpoint, a hub or a directory, with their tokenizers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from atlas import config
from atlas.checkpoint import Checkpoint
from atlas.model.inputs import Inputs
from atlas.model.reader import FusionInDecoder, load_reader, load_reader_state
from atlas.model.retriever import DualEncoder, is_constant, load_retriever, load_retriever_state, state_is_untied
from atlas.model.tokenization import ReaderTokenizer, load_retriever_tokenizer
from atlas.runtime import device as devices
from atlas.runtime import distributed
from atlas.runtime.parallel import shard_weights
from atlas.runtime.tracking import log


@dataclass(frozen=True)
class Model:
    """Reader and retriever, and what makes their tensors from text. A half that the run does without is None."""

    reader: FusionInDecoder | None
    retriever: DualEncoder | None
    inputs: Inputs
    # The retriever of the checkpoint where the run does without it: saved again as it was read.
    unused_retriever: dict[str, torch.Tensor] = field(default_factory=dict)
    unused_retriever_config: dict[str, Any] | None = None

    @classmethod
    def load(
        cls,
        settings: config.Model,
        learning: config.RetrieverTraining,
        optimisation: config.Optimisation,
        checkpoint: Checkpoint | None,
        reader_tokenizer: ReaderTokenizer | None,
        device: torch.device,
        *,
        training: bool,
    ) -> Self:
        """Load what the run needs onto the device; weights come from the checkpoint where it has them. Collective.

        Args:
            training: False to evaluate: nothing learns, and the reader's layers are kept in `--precision`.

        Raises:
            OSError: a model cannot be found or reached, and which flag names it.
            ValueError: the checkpoint's weights do not fit the model, or it lacks a half that is to be evaluated.
        """
        if checkpoint is not None:
            _check_halves(settings, checkpoint, training)
        with distributed.busy():  # ranks may read large files at very different speeds
            reader = retriever = retriever_tokenizer = None
            unused: dict[str, Any] = {}
            if not settings.retrieve_only:
                reader = _load_reader(settings, optimisation, checkpoint, device, training)
            if settings.retrieves:
                retriever_tokenizer = load_retriever_tokenizer(settings.retriever_model_path)
                retriever = _load_retriever(settings, learning, optimisation, checkpoint, training).to(device)
            elif checkpoint and checkpoint.retriever:
                unused = {
                    "unused_retriever": {f"retriever.{name}": part for name, part in checkpoint.retriever.items()},
                    "unused_retriever_config": checkpoint.retriever_config,
                }
            start_id = reader.config.decoder_start_token_id if reader is not None else 0
            tokenizers = reader_tokenizer, retriever_tokenizer
            inputs = Inputs(settings, *tokenizers, device=device, decoder_start_id=start_id, retriever=retriever)
        distributed.wait_for_all("loading the model")
        return cls(reader, retriever, inputs, **unused)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of this rank by their published names, `reader.…` and `retriever.…`."""
        halves = {"reader": self.reader, "retriever": self.retriever}
        return {
            f"{half}.{name}": parameter.detach()
            for half, module in halves.items()
            if module is not None
            for name, parameter in module.named_parameters()
        }

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
    if not checkpoint.reader and not checkpoint.retriever:
        raise ValueError(f"{checkpoint.path} holds no weights at all: give another --model_path, or none")
    halves = (
        ("reader", checkpoint.reader, not settings.retrieve_only, "--reader_model_type", settings.reader_model_type),
        (
            "retriever",
            checkpoint.retriever,
            settings.retrieves,
            "--retriever_model_path",
            settings.retriever_model_path,
        ),
    )
    for half, weights, needed, flag, name in halves:
        if weights or not needed:
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
    optimisation: config.Optimisation,
    checkpoint: Checkpoint | None,
    device: torch.device,
    training: bool,
) -> FusionInDecoder:
    from_checkpoint = checkpoint is not None and bool(checkpoint.reader)
    reader = load_reader(
        settings.reader_model_type,
        dropout=optimisation.dropout,
        weights=not from_checkpoint,
        gradient_checkpointing=optimisation.use_gradient_checkpoint_reader * optimisation.gradient_checkpoint_every,
    )
    if from_checkpoint:
        _load_half(load_reader_state, reader, checkpoint.reader, checkpoint)
    dtype = devices.compute_dtype(optimisation.precision)
    if training and optimisation.shard_grads and distributed.world_size() > 1:
        shard_weights(reader, reader.blocks, device, block_dtype=dtype, forward_methods=("encode",))
        log.info("Each of %d ranks keeps its part of the reader", distributed.world_size())
        return reader
    if not training and dtype is not None:
        # Nothing is learnt: the precision of the computation is enough, and only so much goes to the device.
        for block in reader.blocks:
            block.to(dtype)
    return reader.to(device)


def _load_retriever(
    settings: config.Model,
    learning: config.RetrieverTraining,
    optimisation: config.Optimisation,
    checkpoint: Checkpoint | None,
    training: bool,
) -> DualEncoder:
    from_checkpoint = checkpoint is not None and bool(checkpoint.retriever)
    asked = {
        "pooling": settings.retriever_pooling,
        "normalize": settings.retriever_normalize,
        "query_prefix": settings.retriever_query_prefix,
        "passage_prefix": settings.retriever_passage_prefix,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    untied = from_checkpoint and state_is_untied(checkpoint.retriever)
    retriever = load_retriever(
        settings.retriever_model_path,
        query_side=learning.query_side_retriever_training or untied,
        dropout=optimisation.dropout,
        weights=not from_checkpoint,
        gradient_checkpointing=optimisation.use_gradient_checkpoint_retriever * optimisation.gradient_checkpoint_every,
        overrides=checkpoint.retriever_config | asked if from_checkpoint else asked,
    )
    if from_checkpoint:
        _load_half(load_retriever_state, retriever, checkpoint.retriever, checkpoint)
    if not (training and learning.train_retriever):
        retriever.requires_grad_(False)
    return retriever


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
