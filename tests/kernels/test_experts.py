"""Experts through whatever kernel a CPU has, and what is refused before one runs."""

from __future__ import annotations

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_kernels import apply_experts, prepare_experts


@pytest.fixture
def mixture(random_weight):
    ups = [random_weight(64, 128, 32, act_order=n == 1) for n in range(3)]
    downs = [random_weight(48, 32, 32) for _ in range(3)]
    dtype = torch.float32
    return ups, downs, prepare_experts(ups, dtype), prepare_experts(downs, dtype)


def test_any_kernel_multiplies_expert_by_expert(mixture):
    ups, downs, up, down = mixture
    x, weights = torch.randn(3, 128), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [2, -1], [1, 3]])
    found = apply_experts(x, ids, weights, up, down, "gelu")
    expected = torch.zeros(3, 48)
    for token, place in torch.nonzero((ids >= 0) & (ids < 3)).tolist():
        n = int(ids[token, place])
        gate, other = (ups[n].dequantize().float() @ x[token]).chunk(2)
        hidden = torch.nn.functional.gelu(gate) * other
        expected[token] += weights[token, place] * (downs[n].dequantize().float() @ hidden)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert apply_experts(x[:0], ids[:0], weights[:0], up, down).shape == (0, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 127)}, r"x is torch.float32 \[3, 127\], expected .*\[T, 128\]"),
        ({"ids": torch.zeros(3, 2)}, r"ids are torch.float32 \[3, 2\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"expected .* \[3, topk\]"),
        ({"weights": torch.zeros(3, 1)}, r"weights are .*, expected floats \[3, 2\]"),
        ({"activation": "relu"}, "activation `relu`, expected one of silu"),
        ({"x": torch.zeros(3, 128, device="meta")}, "x on meta, expected cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message, mixture):
    _, _, up, down = mixture
    ids = torch.zeros(3, 2, dtype=torch.int64)
    right = {"x": torch.zeros(3, 128), "ids": ids, "weights": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=message):
        apply_experts(**{**right, "up": up, "down": down, **change})
    with pytest.raises(ValueError, match="up is 3 experts of 48 outputs"):
        apply_experts(**right, up=down, down=down)


def test_experts_that_differ_are_no_stack(random_weight):
    with pytest.raises(QplugError, match="out_features 16 of expert 1"):
        prepare_experts([random_weight(32, 64, 32), random_weight(16, 64, 32)], torch.float32)
    with pytest.raises(QplugError, match="no expert"):
        prepare_experts([], torch.float32)
