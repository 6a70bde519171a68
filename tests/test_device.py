"""Choices that depend on the device."""

import pytest

from atlas.runtime.device import cpu_precision


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_that_emulates_bf16_computes_in_fp32(monkeypatch, fast, precision):
    monkeypatch.setattr("atlas.runtime.device.cpu_prefers_bf16", lambda device: fast)
    assert cpu_precision() == precision
