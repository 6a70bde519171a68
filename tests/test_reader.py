"""Fusion-in-Decoder against transformers' T5, which it must equal wherever both can be asked."""

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from atlas.model.pretrained import checkpoint_activations
from atlas.model.reader import FusionInDecoder, load_reader, load_reader_state, token_log_probabilities
from tests.kit import is_checkpointing
from tests.parity import parity_kit

VOCABULARY = 90
VERSIONS = {"v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True}}
VERSIONS["v1.1"] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def config_of(version: str, **changes) -> T5Config:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    common = {"num_decoder_layers": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    return T5Config(**{**sizes, **common, **VERSIONS[version], **changes})


def stock_t5(version: str, seed: int = 0) -> T5ForConditionalGeneration:
    """A T5 as published: v1.1 with an output layer of its own."""
    torch.manual_seed(seed)
    stock = T5ForConditionalGeneration(config_of(version)).eval()
    for name, parameter in stock.named_parameters():
        if "layer_norm" in name or "relative" in name:
            nn.init.normal_(parameter, mean=float("layer_norm" in name), std=0.5)
    if version == "v1.1":
        stock.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 32) * 0.1)
        assert not stock.config.scale_decoder_outputs
    else:
        stock.shared.weight.data *= 0.3
        assert stock.config.scale_decoder_outputs
    return stock


def reader_of(stock: T5ForConditionalGeneration) -> FusionInDecoder:
    reader = FusionInDecoder(copy.deepcopy(stock.config)).eval()
    load_reader_state(reader, stock.state_dict())
    return reader


@pytest.fixture(params=["v1.0", "v1.1"])
def pair(request) -> tuple[FusionInDecoder, T5ForConditionalGeneration]:
    stock = stock_t5(request.param)
    return reader_of(stock), stock


def test_the_position_bias_lies_in_memory_as_attention_reads_it(pair):
    """Else fused kernels copy it in every layer, or are not taken at all."""
    reader, seen = pair[0], []
    for block in reader.encoder.block:
        attention = block.layer[0].SelfAttention
        forward = attention.forward
        attention.forward = lambda *a, forward=forward, **k: (out := forward(*a, **k), seen.append(out[1]))[0]
    ids = torch.randint(3, VOCABULARY, (2, 3, 7))
    reader.encode(ids, torch.ones_like(ids, dtype=torch.bool))
    assert len(seen) == 3 and all(bias.shape[1:] == (4, 7, 7) and bias.is_contiguous() for bias in seen)


def batch(queries: int = 3, passages: int = 4, length: int = 10, seed: int = 1):
    """ids and mask (B, K, L) with texts of different lengths, labels (B, T) of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (queries, passages, length), generator=generator)
    lengths = torch.randint(2, length + 1, (queries, passages, 1), generator=generator)
    mask = torch.arange(length) < lengths
    labels = torch.randint(3, VOCABULARY, (queries, 6), generator=generator)
    labels[1, 3:] = -100
    return ids * mask, mask, labels


def padded(ids, mask, labels, more: int = 7):
    """The same batch with wider padding, full of tokens that must not matter."""
    return F.pad(ids, (0, more), value=5), F.pad(mask, (0, more)), F.pad(labels, (0, 3), value=-100)


def loss_of(reader, ids, mask, labels):
    log_probabilities = token_log_probabilities(
        reader.logits(reader.encode(ids, mask), mask.flatten(1), reader._shift_right(labels)), labels
    )
    return -log_probabilities.sum() / (labels != -100).sum()


def plain_fusion(stock, ids, mask, labels):
    """One passage at a time through stock T5, the results glued together."""
    hidden = [
        torch.cat([stock.encoder(i[None], attention_mask=m[None].long())[0] for i, m in zip(*row, strict=True)], dim=1)
        for row in zip(ids, mask, strict=True)
    ]
    outputs = BaseModelOutput(last_hidden_state=torch.cat(hidden))
    return stock(encoder_outputs=outputs, attention_mask=mask.flatten(1).long(), labels=labels)


def test_one_passage_is_stock_t5(pair):
    reader, stock = pair
    ids, mask, labels = batch(passages=1)
    expected = stock(input_ids=ids[:, 0], attention_mask=mask[:, 0].long(), labels=labels)
    hidden = reader.encode(ids, mask)
    assert hidden.shape == (3, 10, 32)
    assert_close(reader.logits(hidden, mask[:, 0], reader._shift_right(labels)), expected.logits, atol=5e-6, rtol=1e-6)
    assert_close(loss_of(reader, ids, mask, labels), expected.loss, atol=1e-6, rtol=1e-6)
    again = reader(input_ids=ids[:, 0], attention_mask=mask[:, 0], labels=labels)
    assert_close(again.loss, expected.loss, atol=1e-6, rtol=1e-6)


def test_many_passages_are_encoded_one_by_one_and_read_together(pair):
    reader, stock = pair
    ids, mask, labels = batch()
    expected = plain_fusion(stock, ids, mask, labels)
    assert reader.encode(ids, mask).shape == (3, 4 * 10, 32)
    assert_close(loss_of(reader, ids, mask, labels), expected.loss, atol=1e-6, rtol=1e-6)


def test_gradients_equal_stock(pair):
    reader, stock = pair
    ids, mask, labels = batch()
    loss_of(reader.train(), ids, mask, labels).backward()
    plain_fusion(stock.train(), ids, mask, labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in reader.named_parameters():
        assert_close(parameter.grad, expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_eager_attention_equals_sdpa(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    assert reader.config._attn_implementation == "sdpa"
    expected = loss_of(reader, ids, mask, labels)
    reader.set_attn_implementation("eager")
    assert_close(loss_of(reader, ids, mask, labels), expected, atol=1e-6, rtol=1e-6)


def test_single_kernels_are_in_place(pair):
    reader, _ = pair
    names = {type(module).__name__ for module in reader.modules()}
    assert not names & {"T5LayerNorm", "T5Attention", "T5DenseActDense", "T5DenseGatedActDense", "NewGELUActivation"}


def test_padding_changes_nothing(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    wide = padded(ids, mask, labels)
    assert_close(loss_of(reader, *wide), loss_of(reader, ids, mask, labels), atol=1e-6, rtol=1e-6)
    for beams in (1, 3):
        written = [
            reader.write(reader.encode(i, m), m.flatten(1), max_length=9, num_beams=beams)
            for i, m in (wide[:2], (ids, mask))
        ]
        assert written[0] == written[1]


def test_padding_passages_with_no_token_carry_no_weight(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    more = F.pad(ids, (0, 0, 0, 2), value=7), F.pad(mask, (0, 0, 0, 2)), labels
    assert_close(loss_of(reader, *more), loss_of(reader, ids, mask, labels), atol=1e-6, rtol=1e-6)


def test_log_probabilities_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, torch.tensor(3.0).log()]]])
    assert_close(token_log_probabilities(logits, torch.tensor([[0, 1]])), torch.tensor([[0.5, 0.75]]).log())
    assert token_log_probabilities(logits.bfloat16(), torch.tensor([[-100, 1]]))[0, 0] == 0
    assert token_log_probabilities(logits.bfloat16(), torch.tensor([[-100, 1]])).dtype == torch.float32


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("min_length", [None, 6])
def test_writing_equals_stock_generation(pair, beams, min_length):
    reader, stock = pair
    ids, mask, _ = batch(queries=6, passages=1)
    end = stock.lm_head if stock.lm_head.weight is not stock.shared.weight else stock.shared
    with torch.no_grad():
        end.weight[1] *= 4  # so that some rows end
    load_reader_state(reader, stock.state_dict())
    options = {"max_length": 12, "min_length": min_length, "num_beams": beams, "length_penalty": 0.5}
    rows = stock.generate(input_ids=ids[:, 0], attention_mask=mask[:, 0].long(), **options).tolist()
    expected = [(row[1:] + [1])[: (row[1:] + [1]).index(1)] for row in rows]
    assert len({len(row) for row in expected}) > 1
    assert reader.write(reader.encode(ids, mask), mask[:, 0], **options) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_share_keys_and_values(pair, beams):
    """Those of the hidden states are computed once, whatever the number of tokens and beams, and never copied."""
    reader, projected, kept = pair[0], [], []
    ids, mask, _ = batch(queries=2)

    def note(attention, inputs, named, output) -> None:
        cache = named["cache"] if "cache" in named else named["past_key_values"]  # by version of transformers
        kept.append(cache.cross_attention_cache.layers[attention.layer_idx].keys.data_ptr())

    for block in reader.decoder.block:
        attention = block.layer[1].EncDecAttention
        attention.k.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[:2]))
        attention.register_forward_hook(note, with_kwargs=True)
    reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=9, min_length=9, num_beams=beams)
    assert projected == [(2, mask[0].numel())] * len(reader.decoder.block)
    assert len(kept) == 8 * len(reader.decoder.block) and len(set(kept)) == len(reader.decoder.block)


@torch.no_grad()
def test_what_is_read_twice_is_projected_once(pair, monkeypatch):
    reader, projected = pair[0], []
    ids, mask, labels = batch()
    hidden, mask = reader.encode(ids, mask), mask.flatten(1)

    def both():
        decoder_ids = reader._shift_right(labels)
        return reader.logits(hidden, mask, decoder_ids), reader.write(hidden, mask, max_length=9, num_beams=2)

    expected, of_values, project = both(), reader.decoder.block[0].layer[1].EncDecAttention.v, nn.Linear.forward
    note = lambda module, states: projected.extend([states] * (module is of_values))  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", lambda module, states: note(module, states) or project(module, states))
    with reader.reading_twice(hidden):
        for _ in range(2):
            logits, rows = both()
            assert torch.equal(logits, expected[0]) and rows == expected[1]
    assert len(projected) == 2
    both()
    assert len(projected) == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_different_lengths(pair, beams):
    """Every row equals generation of that row alone, behind its own prompt given as decoder input."""
    reader, _ = pair
    ids, mask, _ = batch(queries=4)
    prompt = [[7, 8], [], [9], [11, 12, 13]]
    hidden, mask = reader.encode(ids, mask), mask.flatten(1)
    written = reader.write(hidden, mask, max_length=10, num_beams=beams, prompt=prompt)
    for row, tokens in enumerate(prompt):
        alone = reader.write(
            hidden[row : row + 1], mask[row : row + 1], max_length=10, num_beams=beams, prompt=[tokens]
        )
        assert written[row] == alone[0]
        if beams == 1:
            start = torch.tensor([[0, *tokens]])
            outputs = BaseModelOutput(last_hidden_state=hidden[row : row + 1])
            long = reader.generate(
                encoder_outputs=outputs, attention_mask=mask[row : row + 1], decoder_input_ids=start, max_length=10
            )[0].tolist()
            assert alone[0] == (long + [1])[len(tokens) + 1 : (long + [1]).index(1)]


def test_a_prompt_longer_than_the_answer_leaves_nothing(pair):
    reader, _ = pair
    ids, mask, _ = batch(queries=2)
    rows = reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=4, prompt=[[5] * 9, []])
    assert rows[0] == []
    assert rows[1] == reader.write(reader.encode(ids, mask), mask.flatten(1), max_length=4)[1]


def test_gradient_checkpointing_changes_no_gradient(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    gradients, computed = [], []
    for block in reader.blocks:
        block.layer[-1].register_forward_pre_hook(lambda *_: computed.append(1))  # also where it is computed again
    for every in (None, 1, 2, 3):
        if every:
            checkpoint_activations(reader, every)
        reader.train().zero_grad()
        computed.clear()
        loss_of(reader, ids, mask, labels).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in reader.named_parameters()})
        layers = len(reader.blocks)
        assert len(computed) == layers + (-(-layers // every) if every else 0)
    for others in gradients[1:]:
        assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in others.items())


def test_autocast_is_close_and_keeps_parameters_in_fp32(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    expected = loss_of(reader, ids, mask, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(reader.train(), ids, mask, labels)
    loss.backward()
    assert_close(loss, expected, atol=0.05, rtol=0.02)
    assert {parameter.dtype for parameter in reader.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in reader.parameters())


class NoHostSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return function(*args, **(kwargs or {}))


def test_training_never_waits_for_the_device(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    with NoHostSynchronisation():
        loss_of(reader.train(), ids, mask, labels).backward()


# loading


def save(stock: T5ForConditionalGeneration, directory) -> str:
    stock.save_pretrained(directory)
    return str(directory)


def test_separate_embeddings_survive_loading_and_training(tmp_path):
    """transformers 5 would tie them and overwrite one by the other without a word."""
    stock = stock_t5("v1.1")
    ids, mask, labels = batch()
    expected = plain_fusion(stock, ids, mask, labels).loss
    directory = save(stock, tmp_path)
    from_directory = load_reader(directory, dropout=None)
    from_state = load_reader(directory, dropout=None, weights=False)
    load_reader_state(from_state, {name: tensor.clone() for name, tensor in stock.state_dict().items()})
    for reader in (from_directory, from_state):
        assert_close(reader.shared.weight, stock.shared.weight)
        assert_close(reader.lm_head.weight, stock.lm_head.weight)
        assert_close(loss_of(reader.eval(), ids, mask, labels), expected, atol=1e-6, rtol=1e-6)
        optimizer = torch.optim.SGD(reader.train().parameters(), lr=0.1)
        loss_of(reader, ids, mask, labels).backward()
        optimizer.step()
        reader.tie_weights()  # whatever transformers may do to it later
        assert reader.encoder.embed_tokens.weight is reader.decoder.embed_tokens.weight is reader.shared.weight
        assert not torch.equal(reader.shared.weight, stock.shared.weight)
        assert not torch.equal(reader.lm_head.weight, stock.lm_head.weight)
        assert not torch.equal(reader.lm_head.weight, reader.shared.weight)
        trained = loss_of(reader.eval(), ids, mask, labels)
        reader.save_pretrained(tmp_path / "trained")
        reloaded = load_reader(str(tmp_path / "trained"), dropout=None).eval()
        assert_close(loss_of(reloaded, ids, mask, labels), trained, atol=1e-6, rtol=1e-6)


def test_tied_embeddings_stay_one_parameter(tmp_path):
    stock = stock_t5("v1.0")
    ids, mask, labels = batch()
    expected = plain_fusion(stock, ids, mask, labels).loss
    directory = save(stock, tmp_path)
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for absent in ((), ("lm_head.weight",), ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")):
        reader = load_reader(directory, dropout=None, weights=False)
        load_reader_state(reader, {name: tensor for name, tensor in state.items() if name not in absent})
        assert reader.lm_head.weight is reader.shared.weight is reader.encoder.embed_tokens.weight
        assert_close(loss_of(reader.eval(), ids, mask, labels), expected, atol=1e-6, rtol=1e-6)
    reader = load_reader(directory, dropout=None).eval()
    assert reader.lm_head.weight is reader.shared.weight is reader.encoder.embed_tokens.weight
    assert_close(loss_of(reader, ids, mask, labels), expected, atol=1e-6, rtol=1e-6)


def test_a_reader_can_change_from_separate_to_tied_and_back():
    reader = reader_of(stock_t5("v1.1"))
    for seed in (1, 2):
        for version in ("v1.0", "v1.1"):
            stock = stock_t5(version, seed)
            state = {name: tensor for name, tensor in stock.state_dict().items() if "wi" not in name}
            state |= {name: tensor for name, tensor in reader.state_dict().items() if "wi" in name}
            load_reader_state(reader, state)
            assert_close(reader.state_dict(), state)
            assert (reader.lm_head.weight is reader.shared.weight) == (version == "v1.0")


def test_state_dict_has_the_names_of_t5(pair):
    reader, stock = pair
    assert reader.state_dict().keys() == stock.state_dict().keys()
    stock.load_state_dict(reader.state_dict())


def test_copied_state_is_not_shared_with_its_source(pair):
    reader, stock = pair
    storages = {parameter.data_ptr() for parameter in stock.parameters()}
    assert not storages & {parameter.data_ptr() for parameter in reader.parameters()}


def test_half_precision_weights_become_fp32(tmp_path):
    stock = stock_t5("v1.1").half()
    for weights in (True, False):
        reader = load_reader(save(stock, tmp_path), dropout=None, weights=weights)
        if not weights:
            load_reader_state(reader, stock.state_dict())
        assert {parameter.dtype for parameter in reader.parameters()} == {torch.float32}


def test_unfit_state_names_what_is_wrong():
    stock = stock_t5("v1.1")
    reader = reader_of(stock)
    state = stock.state_dict()
    del state["encoder.final_layer_norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["shared.weight"] = torch.zeros(5, 32)
    message = (
        r"missing encoder\.final_layer_norm\.weight; unexpected surplus; shared\.weight is \(5, 32\), not \(90, 32\)"
    )
    with pytest.raises(ValueError, match=message):
        load_reader_state(reader, state)
    with pytest.raises(ValueError, match="missing decoder.* and [0-9]+ more"):
        load_reader_state(reader, {})


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_reaches_everything(tmp_path, weights):
    directory = save(stock_t5("v1.1"), tmp_path)
    reader = load_reader(directory, dropout=0.25, weights=weights)
    modules = [module for module in reader.modules() if isinstance(module, nn.Dropout)]
    attentions = [module for module in reader.modules() if hasattr(module, "relative_attention_num_buckets")]
    assert len(modules) > 10
    assert {module.p for module in modules} == {0.25}
    assert len(attentions) == 3 + 2 * 2
    assert {module.dropout for module in attentions} == {0.25}
    assert {m.p for m in load_reader(directory, dropout=None).modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_attention_dropout_acts(pair):
    reader, _ = pair
    ids, mask, labels = batch()
    expected = loss_of(reader.train(), ids, mask, labels)
    for module in reader.modules():
        if hasattr(module, "relative_attention_num_buckets"):
            module.dropout = 0.5
    assert not torch.allclose(loss_of(reader, ids, mask, labels), expected)
    assert_close(loss_of(reader.eval(), ids, mask, labels), expected)


def test_checkpointing_is_asked_for(tmp_path):
    reader = load_reader(save(stock_t5("v1.1"), tmp_path), dropout=None, gradient_checkpointing=True)
    assert is_checkpointing(reader)


def test_published_checkpoint_keeps_its_embeddings_apart():
    kit = parity_kit()
    with torch.serialization.safe_globals([argparse.Namespace]):
        published = torch.load(kit / "published" / "model.pth.tar", weights_only=True, map_location="cpu")["model"]
    state = {name.removeprefix("reader."): tensor for name, tensor in published.items() if name.startswith("reader.")}
    assert not torch.equal(state["shared.weight"], state["lm_head.weight"])
    for weights in (True, False):
        reader = load_reader(str(kit / "models" / "reader"), dropout=None, weights=weights)
        load_reader_state(reader, {name: tensor.clone() for name, tensor in state.items()})
        assert_close(dict(reader.state_dict()), state, atol=0, rtol=0)


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    BertConfig().save_pretrained(tmp_path / "bert")
    config_of("v1.1").save_pretrained(tmp_path / "no_weights")
    stock_t5("v1.1").save_pretrained(tmp_path / "other_size")
    config_of("v1.1", num_layers=4).save_pretrained(tmp_path / "other_size")
    (tmp_path / "empty").mkdir()
    names = [
        "owner/no-such-model",
        *(str(tmp_path / n) for n in ("bert", "no_weights", "other_size", "empty", "absent")),
    ]
    for name in names:
        with pytest.raises(OSError, match=f"--reader_model_type {name}: ") as raised:
            load_reader(name, dropout=None)
        assert len(str(raised.value).splitlines()) == 1
