"""A reader in 8 bits: how far off its products are, and that its answers hardly change."""

import pytest
import torch
from torch import nn

from atlas.model.int8 import Int8Linear, round_to_int8
from atlas.model.reader import load_reader
from tests.kit import language_model, read_jsonl, run, world


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_weights(bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias)
    linear.weight.data[3] = 0  # a row without a largest weight
    rounded, hidden = Int8Linear(linear), torch.randn(5, 7, 48)
    assert rounded.weight.dtype == torch.int8 and rounded.weight.abs().amax(1)[4:].eq(127).all()
    weight = rounded.weight.float() * rounded.scale[:, None]
    error = (weight - linear.weight).abs()
    assert (error <= linear.weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    expected = nn.functional.linear(hidden, weight, linear.bias)
    torch.testing.assert_close(rounded(hidden), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded(hidden).dtype == torch.bfloat16
        torch.testing.assert_close(rounded(hidden).float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_all_matrices_of_the_layers_become_integers(kind):
    name = world() / "models/reader" if kind == "t5" else language_model()
    reader = load_reader(str(name), dropout=None)
    linear = sum(isinstance(part, nn.Linear) for block in reader.blocks for part in block.modules())
    before = sum(p.numel() for block in reader.blocks for p in block.parameters())
    round_to_int8(reader.blocks)
    parts = [part for block in reader.blocks for part in block.modules()]
    assert sum(isinstance(part, Int8Linear) for part in parts) == linear > 5
    assert not any(isinstance(part, nn.Linear) for part in parts)
    held = sum(t.numel() * t.itemsize for block in reader.blocks for t in (*block.parameters(), *block.buffers()))
    assert held < 1.2 * before  # bytes: 1 for a weight, and its share of scales and norms


@pytest.mark.processes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_answers_as_before(tmp_path, precision):
    flags = {"train_data": None, "precision": precision}
    rows = [
        read_jsonl(run(tmp_path, "evaluate", name=name, **flags, int8_reader=name == "int8") / "dev-step-0.jsonl")
        for name in ("whole", "int8")
    ]
    same = [x["generation"] == y["generation"] for x, y in zip(*rows, strict=True)]
    assert sum(same) >= 0.7 * len(same)  # of an untrained reader, whose best tokens are close to each other
