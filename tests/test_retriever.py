"""Contriever against transformers' BERT and recordings of the published system; the two kinds of dual encoder."""

import argparse
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config

from atlas.model.retriever import (
    ATTENTION,
    Contriever,
    DualEncoder,
    fingerprint,
    load_retriever,
    load_retriever_state,
    state_is_untied,
    use_uncentered_layer_norm,
)
from atlas.model.tokenization import load_retriever_tokenizer, pad_rows
from atlas.runtime.device import autocast
from tests.kit import is_checkpointing
from tests.parity import parity_kit


def config_of(**changes) -> BertConfig:
    sizes = {"vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return BertConfig(**{**sizes, "intermediate_size": 40, "max_position_embeddings": 32, **changes})


def contriever_of(seed: int = 0, **changes) -> Contriever:
    torch.manual_seed(seed)
    contriever = Contriever(config_of(**changes)).eval()
    for parameter in contriever.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)  # biases and norms too
    return contriever


def texts(n: int = 5, longest: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (n, L) of texts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = [longest, *torch.randint(1, longest, (n - 1,), generator=generator).tolist()]
    return pad_rows([torch.randint(1, 70, (length,), generator=generator).tolist() for length in lengths], pad_id=0)


@pytest.mark.parametrize("pooling", ["average", "sqrt", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_text_by_text(pooling, normalize):
    contriever = contriever_of(pooling=pooling, normalize=normalize)
    bert = BertModel(config_of(), add_pooling_layer=False).eval()
    bert.load_state_dict(contriever.state_dict())
    ids, mask = texts()
    embeddings = contriever(ids, mask)
    assert embeddings.shape == (5, 24)
    for row, real, embedding in zip(ids, mask, embeddings, strict=True):
        hidden = bert(input_ids=row[real][None])[0][0]  # no padding at all
        expected = {"average": hidden.mean(0), "sqrt": hidden.sum(0) / len(hidden) ** 0.5, "cls": hidden[0]}[pooling]
        expected = expected / expected.norm() if normalize else expected
        assert_close(embedding, expected, atol=2e-6, rtol=1e-5)


def test_average_is_the_default_and_others_are_refused():
    assert not hasattr(config_of(), "pooling")
    assert contriever_of().pooling == "average"
    with pytest.raises(ValueError, match="pooling 'max'.*average, sqrt, cls"):
        contriever_of(pooling="max")


@pytest.mark.parametrize("uncentered", [False, True])
def test_padding_and_company_change_no_embedding(uncentered):
    contriever = contriever_of(uncentered_layer_norm=uncentered)
    ids, mask = texts()
    expected = contriever(ids, mask)
    for more in (1, 4, 20):
        wide = contriever(F.pad(ids, (0, more), value=9), F.pad(mask, (0, more)))
        assert_close(wide, expected, atol=1e-6, rtol=1e-6)
    order = torch.tensor([3, 1, 4])
    assert_close(contriever(ids[order], mask[order]), expected[order], atol=1e-6, rtol=1e-6)


def test_a_text_without_tokens_is_finite():
    ids, mask = texts()
    mask[1] = False
    assert contriever_of()(ids, mask).isfinite().all()


def test_no_texts_give_no_embeddings():
    assert contriever_of()(*pad_rows([], pad_id=0)).shape == (0, 24)


def test_a_text_beyond_the_positions_is_refused():
    ids = torch.ones(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="33 tokens .* 32 positions; lower --text_maxlength"):
        contriever_of()(ids, ids.bool())


@pytest.mark.parametrize("autocast", [False, True])
def test_uncentered_layer_norm_is_its_formula(autocast):
    contriever = contriever_of(uncentered_layer_norm=True, layer_norm_eps=1e-3)
    norm = contriever.embeddings.LayerNorm
    x = torch.randn(4, 7, 24) + 2
    expected = (x - x.mean(-1, keepdim=True)) / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(norm(x), expected * norm.weight + norm.bias, atol=2e-6, rtol=1e-5)
    centered = contriever_of(layer_norm_eps=1e-3)
    assert centered.state_dict().keys() == contriever.state_dict().keys()
    ids, mask = texts()
    assert not torch.allclose(centered(ids, mask), contriever(ids, mask), rtol=1e-3)
    use_uncentered_layer_norm(DualEncoder(centered, query_side=False))
    assert_close(centered(ids, mask), contriever(ids, mask), atol=0, rtol=0)
    assert centered.config.uncentered_layer_norm


def test_the_kind_of_layer_norm_is_saved_with_the_model(tmp_path):
    contriever = contriever_of()
    use_uncentered_layer_norm(contriever)
    contriever.save_pretrained(tmp_path)
    loaded = load_retriever(str(tmp_path), query_side=False, dropout=None)
    ids, mask = texts()
    assert_close(loaded.embed_queries(ids, mask), contriever(ids, mask), atol=0, rtol=0)


def test_published_embeddings():
    kit = parity_kit()
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(kit / "published" / "model.pth.tar", weights_only=True, map_location="cpu")["model"]
    state = {name.removeprefix("retriever."): x for name, x in state.items() if name.startswith("retriever.")}
    assert "contriever.embeddings.position_ids" in state
    recorded = json.loads((kit / "retriever.json").read_text())
    tokenizer = load_retriever_tokenizer(str(kit / "models" / "retriever"))
    for query_side in (False, True):
        retriever = load_retriever(
            str(kit / "models" / "retriever"), query_side=query_side, dropout=None, weights=query_side
        )
        load_retriever_state(retriever, state)
        sides = {"query": retriever.embed_queries, "passage": retriever.embed_passages}
        embeddings = {}
        for side, embed in sides.items():
            rows = tokenizer.encode(recorded[f"{side}_text"], 64)
            with torch.no_grad():
                embeddings[side] = embed(*pad_rows(rows, tokenizer.pad_id))
            first = torch.tensor(recorded[f"{side}_embedding_first_8"])
            assert (embeddings[side][:, :8] - first).norm() < 1e-4 * first.norm()
            assert_close(embeddings[side].norm(dim=1), torch.tensor(recorded[f"{side}_norm"]), atol=0, rtol=1e-4)
        scores = embeddings["query"] @ embeddings["passage"].T
        assert_close(scores, torch.tensor(recorded["scores"]), atol=1e-4, rtol=1e-4)


class NoHostSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("uncentered", [False, True])
def test_embedding_never_waits_for_the_device(uncentered):
    contriever = contriever_of(uncentered_layer_norm=uncentered)
    ids, mask = texts()
    with NoHostSynchronisation():
        contriever(ids, mask).sum().backward()


# two encoders


class AttentionDtypes(TorchDispatchMode):
    """Notes in which dtypes the fused attention of a CPU, and its gradients, are computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_attention_are_computed_in_fp32_on_a_cpu(precision, learns, tmp_path):
    model, (ids, mask) = contriever_of().eval().requires_grad_(learns), texts()
    with autocast(torch.device("cpu"), precision), AttentionDtypes() as noted:
        embeddings = model(ids, mask)
        if learns:
            embeddings.sum().backward()
    assert noted.seen == {torch.bfloat16 if precision == "bf16" and not learns else torch.float32}
    model.set_attn_implementation("sdpa")
    assert_close(embeddings, model(ids, mask), atol=0.0 if precision == "fp32" else 0.05, rtol=0)
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_tied_is_one_encoder():
    retriever = DualEncoder(contriever_of(), query_side=False).train()
    assert (retriever.dim, retriever.max_length, retriever.query_side) == (24, 32, False)
    assert retriever.query_encoder is retriever.passage_encoder is retriever.contriever
    assert all(parameter.requires_grad for parameter in retriever.parameters())
    assert all(name.startswith("contriever.") for name in retriever.state_dict())
    assert all(module.training for module in retriever.modules())


def test_query_side_training_moves_every_query_weight_and_no_passage_weight():
    contriever = contriever_of(hidden_dropout_prob=0.1)
    start = {name: tensor.clone() for name, tensor in contriever.state_dict().items()}
    retriever = DualEncoder(contriever, query_side=True).train()
    ids, mask = texts(n=40)
    ids[0, :12] = torch.arange(1, 13)
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        scores = retriever.embed_queries(ids, mask) @ retriever.embed_passages(ids, mask).T
        scores.square().mean().backward()
        optimizer.step()
    assert set(retriever.state_dict()) == {f"{side}_contriever.{n}" for side in ("query", "passage") for n in start}
    for name, tensor in start.items():
        assert torch.equal(retriever.passage_contriever.state_dict()[name], tensor), name
        assert not torch.equal(retriever.query_contriever.state_dict()[name], tensor), name


def test_the_frozen_encoder_stays_in_eval_mode():
    retriever = DualEncoder(contriever_of(), query_side=True).train()
    assert retriever.query_encoder.training
    assert not any(module.training for module in retriever.passage_encoder.modules())
    ids, mask = texts()
    assert torch.equal(retriever.embed_passages(ids, mask), retriever.embed_passages(ids, mask))
    assert not torch.equal(retriever.embed_queries(ids, mask), retriever.embed_queries(ids, mask))
    assert not retriever.eval().query_encoder.training


def test_states_tied_and_untied():
    tied, other = DualEncoder(contriever_of(0), query_side=False), DualEncoder(contriever_of(1), query_side=True)
    tied_state = dict(tied.state_dict())
    untied_state = {f"query_{name}": tensor for name, tensor in tied_state.items()}
    untied_state |= {f"passage_{name}": tensor + 1 for name, tensor in tied_state.items()}
    old = {"embeddings.position_ids": torch.arange(32)[None]}
    assert state_is_untied(untied_state)
    assert not state_is_untied(tied_state)

    load_retriever_state(other, tied_state | {f"contriever.{name}": x for name, x in old.items()})
    for encoder in (other.query_encoder, other.passage_encoder):
        assert_close(dict(encoder.state_dict()), dict(tied.contriever.state_dict()), atol=0, rtol=0)
    sources = {tensor.data_ptr() for tensor in tied_state.values()}
    assert len({tensor.data_ptr() for tensor in other.parameters()} | sources) == 3 * len(tied_state)

    load_retriever_state(other, untied_state | {f"query_contriever.{name}": x for name, x in old.items()})
    assert_close(dict(other.state_dict()), untied_state, atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in other.passage_encoder.parameters())
    with pytest.raises(ValueError, match="--query_side_retriever_training"):
        load_retriever_state(tied, untied_state)


def test_unfit_state_names_what_is_wrong():
    retriever = DualEncoder(contriever_of(), query_side=False)
    state = retriever.state_dict()
    del state["contriever.embeddings.LayerNorm.bias"]
    with pytest.raises(ValueError, match=r"do not fit the retriever: .*contriever\.embeddings\.LayerNorm\.bias"):
        load_retriever_state(retriever, state)
    other = DualEncoder(contriever_of(intermediate_size=41), query_side=False)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.weight.*40.*41"):
        load_retriever_state(other, DualEncoder(contriever_of(), query_side=False).state_dict())


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    contriever_of().save_pretrained(tmp_path)
    ids, mask = texts()
    gradients = []
    for checkpointing in (False, True):
        retriever = load_retriever(
            str(tmp_path), query_side=False, dropout=0.0, gradient_checkpointing=checkpointing
        ).train()
        assert is_checkpointing(retriever.contriever) == checkpointing
        retriever.embed_queries(ids, mask).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in retriever.named_parameters()})
    assert_close(gradients[0], gradients[1])


# loading


@pytest.mark.parametrize("query_side", [False, True])
def test_dropout_reaches_every_encoder(tmp_path, query_side):
    contriever_of().save_pretrained(tmp_path)
    for weights in (True, False):
        retriever = load_retriever(str(tmp_path), query_side=query_side, dropout=0.3, weights=weights)
        found = [module.p for module in retriever.modules() if isinstance(module, nn.Dropout)]
        assert len(found) == (1 + 2 * 3) * (1 + query_side)
        assert set(found) == {0.3}


def test_weights_are_loaded_from_a_bert_with_a_head(tmp_path):
    """As `bert-base-uncased` comes: names behind `bert.`, an unwanted head. Half precision becomes fp32."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(config_of()).half()
    bert.save_pretrained(tmp_path)
    loaded = load_retriever(str(tmp_path), query_side=False, dropout=None).contriever
    expected = {name: tensor.float() for name, tensor in bert.bert.state_dict().items()}
    assert_close(dict(loaded.state_dict()), expected, atol=0, rtol=0)
    assert loaded.embeddings.position_ids.tolist() == [list(range(32))]
    assert loaded.embeddings.token_type_ids.tolist() == [[0] * 32]


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    T5Config().save_pretrained(tmp_path / "t5")
    config_of().save_pretrained(tmp_path / "no_weights")
    contriever_of().save_pretrained(tmp_path / "fewer_layers")
    config_of(num_hidden_layers=3).save_pretrained(tmp_path / "fewer_layers")
    (tmp_path / "empty").mkdir()
    names = ["owner/no-such-model"]
    names += [str(tmp_path / name) for name in ("t5", "no_weights", "fewer_layers", "empty", "absent")]
    for name in names:
        with pytest.raises(OSError, match=f"--retriever_model_path {name}: ") as raised:
            load_retriever(name, query_side=False, dropout=None)
        assert len(str(raised.value).splitlines()) == 1


def test_fingerprint_notices_every_weight():
    contriever = contriever_of()
    start = fingerprint(contriever)
    assert start == fingerprint(contriever_of()) != fingerprint(contriever_of(seed=1))
    assert start == fingerprint(DualEncoder(contriever, query_side=True).passage_encoder)
    for parameter in contriever.parameters():
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1] += 1e-3
        assert fingerprint(contriever) != start
        parameter.data.copy_(kept.flip(0))
        assert fingerprint(contriever) != start
        parameter.data.copy_(kept)
    assert fingerprint(contriever) == start
