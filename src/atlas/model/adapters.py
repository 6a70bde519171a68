"""LoRA (Hu et al. 2022): low-rank adapters of linear layers, which learn in the place of the layers.

peft makes them, in our own modules, and its form is the one on disk. To use a model that has been trained so, they are
added to the weights, which needs no peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from atlas import config
from atlas.checkpoint import HALF_OF, Adapter, Base, Checkpoint, check_tensors
from atlas.model.pretrained import add_weights
from atlas.runtime.tracking import log

PREFIX = "base_model.model."  # what peft saves before the name of a layer
PAIR = ("lora_A.weight", "lora_B.weight")  # (r, in), (out, r)
# Of peft's settings, those that say something else than a product of two matrices, and what they have to be here.
PLAIN = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none"}
PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}}


def add_adapters(
    model: nn.Module, layers: Iterable[nn.Module], lora: config.Lora, flag: str, *, task: str | None = None
) -> None:
    """Freeze a model, and give linear layers in some of its parts adapters, which are trained.

    Adapters begin without effect: B is zero, A is drawn from torch's generator.

    Args:
        layers: where linear layers are looked for.
        flag: the beginning of the flags' names, for the message.
        task: as peft calls it; what loads the adapter elsewhere goes by it.

    Raises:
        ValueError: there are no layers of such names.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    linear = {
        name.rpartition(".")[2]
        for layer in layers
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    }
    if unknown := sorted(set(lora.targets) - linear):
        raise ValueError(
            f"--{flag}_targets: there is no linear layer called {unknown[0]}; there are {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets or linear),
        task_type=task,
    )
    inject_adapter_in_model(settings, model)
    for part in model.modules():
        if isinstance(part, LoraLayer):
            part.cast_input_dtype_enabled = False  # autocast does it, without a copy in fp32
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    log.info("--%s_rank %d: %s weights are trained, %s are frozen", flag, lora.rank, f"{trained:,}", f"{frozen:,}")


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters of this model are trained."""
    return bool(getattr(model, "peft_config", None))


def adapter_of(model: nn.Module, base: Base) -> Adapter:
    """The adapters of a model, whose weights may be sharded, as peft saves them."""
    described = model.peft_config["default"].to_dict()
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
    settings |= {"peft_type": "LORA", "base_model_name_or_path": base.checkpoint or base.model, "inference_mode": True}
    return Adapter(settings, {name: parameter.detach() for name, parameter in _parameters(model).items()})


@torch.no_grad()
def restore_adapters(model: nn.Module, adapter: Adapter, file: Path, flag: str) -> None:
    """Go on with adapters that were saved.

    Args:
        model: with adapters as the flags of this run describe them.

    Raises:
        ValueError: those in the file are others.
    """
    ours = adapter_of(model, Base("")).settings
    for name, peft_name in (("rank", "r"), ("alpha", "lora_alpha"), ("targets", "target_modules")):
        here, there = (settings.get(peft_name) for settings in (ours, adapter.settings))
        if here != (sorted(there) if isinstance(there, list) else there):
            here, there = (",".join(value) if isinstance(value, list) else value for value in (here, there))
            raise ValueError(f"{file} was trained with --{flag}_{name} {there}, and this run has {here}: use the same")
    parameters = _parameters(model)
    check_tensors(file, adapter.weights, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(adapter.weights[name])


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter, file: Path) -> None:
    """Add adapters that were saved to the weights of a model without any: W + BA · alpha / r, in fp32.

    Raises:
        ValueError: they are not such adapters, or belong to another model.
    """
    settings = adapter.settings
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    plain = all(settings.get(name, value) == value for name, value in PLAIN.items())
    if not plain or not all(type(number) is int and 0 < number < 2**31 for number in (rank, alpha)):
        raise ValueError(f"{file.with_name('adapter_config.json')} describes no adapters as train.py makes them")
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    names = {name.removeprefix(PREFIX).removesuffix(f".{end}") for name in adapter.weights for end in PAIR}
    layers = {name: linear[name] for name in sorted(names & linear.keys())}
    expected = {
        f"{PREFIX}{name}.{end}": torch.empty(shape, device="meta")
        for name, layer in layers.items()
        for end, shape in zip(PAIR, ((rank, layer.in_features), (layer.out_features, rank)), strict=True)
    }
    check_tensors(file, adapter.weights, expected)
    for name, layer in layers.items():
        a, b = (adapter.weights[f"{PREFIX}{name}.{end}"] for end in PAIR)
        layer.weight.data = layer.weight + (b @ a) * (alpha / rank)


def merge_saved(
    model: nn.Module, name: str, encoders: Iterable[nn.Module], model_name: str, checkpoint: Checkpoint
) -> None:
    """Add the adapters that a checkpoint has for a model, if any, to its weights.

    Args:
        name: as in `checkpoint.HALF_OF`.
        encoders, model_name: as for `base_of`.

    Raises:
        ValueError: the model is another one than the checkpoint's.
    """
    if HALF_OF[name] in checkpoint.bases:
        base_of(HALF_OF[name], encoders, model_name, checkpoint)
    if (adapter := checkpoint.adapters.get(name)) is not None:
        merge_adapter(model, adapter, checkpoint.file(f"{name}_adapter/adapter_model"))


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the matrices that are not trained in 16 bits. Autocast computes products with them so in any case.

    Embeddings and norms stay as they are: the sum of all layers' outputs is fp32.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for part in model.modules():
        if isinstance(part, nn.Linear) and not part.weight.requires_grad and id(part.weight) not in embeddings:
            part.weight = nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)


def base_of(half: str, encoders: Iterable[nn.Module], model: str, checkpoint: Checkpoint | None) -> Base:
    """What to save as the base of a half that was just loaded.

    Args:
        encoders: the reader, or both encoders of the retriever, before adapters.
        model: the hub id or directory of its T5 or BERT.
        checkpoint: that it was loaded from.

    Raises:
        ValueError: the checkpoint's adapter belongs to other weights.
    """
    prints = []
    for encoder in encoders:
        digest = sha256()
        add_weights(digest, dict(encoder.named_parameters()))
        prints.append(digest.hexdigest()[:16])
    fingerprint = "-".join(dict.fromkeys(prints))  # one encoder for both, or two that are the same
    known = checkpoint.bases.get(half) if checkpoint is not None else None
    if known is None:
        holds = checkpoint is not None and checkpoint.holds(half)
        return Base(model, str(checkpoint.path.resolve()) if holds else None, fingerprint)
    if known.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{checkpoint.path} belongs to other weights of the {half} than those of {known.checkpoint or model}: "
            f"they have the fingerprint {fingerprint}, and it was trained with {known.fingerprint}; give the right ones"
        )
    return Base(model, known.checkpoint, fingerprint)


def _parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The adapters' parameters by the names that peft saves them by."""
    from peft import get_peft_model_state_dict

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {f"{PREFIX}{name}": parameter for name, parameter in named.items()}
