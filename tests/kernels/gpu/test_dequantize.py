"""Many tokens on an affine grid: slabs against the layout's own decoding, their sizes."""

from __future__ import annotations

import pytest
import torch

from qplug_kernels import Problem
from qplug_kernels.gpu import affine, configs, dequantize, planes

F16, BF16 = torch.float16, torch.bfloat16


def operands_of(weight, dtype, device):
    weight = weight.to(device)
    problem = Problem.here(weight, dtype, device)
    assert planes.cannot(problem) is None
    return list(affine.prepare(weight, problem).values())


@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size", "dtype", "more"),
    [
        (130, 320, 4, 64, F16, {}),
        (5, 512, 2, 512, BF16, {}),
        (140, 1008, 3, 1008, F16, {}),  # one group, K no multiple of a tile
        (64, 256, 8, 32, BF16, {}),
        (64, 528, 8, 48, F16, {}),
        (20, 1536, 4, 512, F16, {}),  # groups of two tiles
        (130, 320, 4, 32, F16, {"act_order": True}),
        (40, 300, 3, 100, BF16, {"act_order": True}),  # places that hold no input
    ],
)
def test_a_slab_is_the_weight_rounded(n, k, bits, group_size, dtype, more, random_weight, device):
    operands = operands_of(random_weight(n, k, group_size, bits=bits, **more), dtype, device)
    exact = planes.dequantize(planes.Form.of(operands), operands)
    assert torch.equal(affine.decode_all(operands), exact.float().to(dtype))


def test_a_slab_of_a_symmetric_grid(random_weight, device):
    weight = random_weight(130, 320, 64)
    weight.grid.zeros.fill_(8)
    operands = operands_of(weight, F16, device)
    assert planes.Form.of(operands).symmetric
    assert torch.equal(affine.decode_all(operands).cpu(), weight.dequantize().half())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_slab_by_slab(bias, act_order, random_weight, device, monkeypatch):
    """Three slabs, the last of them short."""
    monkeypatch.setattr(dequantize, "rows_of", lambda *_: 128)
    monkeypatch.setattr(affine, "FEW", 4)
    weight = random_weight(300, 304, 76 if act_order else 304, act_order=act_order)
    operands = operands_of(weight, F16, device)
    assert (len(operands) == 4) == act_order
    x = torch.randn(5, 304).to(device, F16)
    added = torch.randn(300).to(device, F16) if bias else None
    expected = x.double() @ weight.dequantize().double().T.to(device)
    expected = expected + added.double() if bias else expected
    found = affine.run(x, operands, added)
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def test_a_slab_begins_where_it_is_told(random_weight, device):
    operands = operands_of(random_weight(400, 256, 128), F16, device)
    form = planes.Form.of(operands)
    whole = affine.decode_all(operands)
    for tile, rows in ((1, 128), (2, 144), (3, 16)):
        slab = dequantize.empty_slab(rows, 256, whole)
        affine.write_slab(operands, form, tile, slab)
        assert torch.equal(slab, whole[tile * 128 : tile * 128 + rows])


H200 = (50 << 20, 132)


@pytest.mark.parametrize(
    ("tokens", "outputs", "places", "cached"),
    [
        (4096, 28672, 4096, True),  # gate_up of 8B: ten slabs of 24 MB
        (4096, 4096, 14336, False),  # down: the cache holds 800 outputs, the card wants 2112
        (1024, 28672, 4096, False),  # few tokens do not occupy the card with what the cache holds
        (512, 57344, 8192, False),  # nor with what is allowed: 64 MB
    ],
)
def test_slabs_stay_in_the_cache_unless_the_card_would_idle(
    tokens, outputs, places, cached, monkeypatch, device
):
    monkeypatch.setattr(dequantize, "_card", lambda _: H200)
    rows = dequantize.rows_of(tokens, outputs, places, 128, device)
    assert rows % 128 == 0
    tiles = -(-tokens // 128) * rows // 128
    assert (2 * rows * places <= 0.5 * H200[0]) == cached
    assert 2 * rows * places <= dequantize.MOST
    assert tiles >= 0.8 * 4 * 132 or 2 * rows * places > 0.8 * dequantize.MOST


def test_slabs_are_alike(monkeypatch, device):
    """No last slab of a few outputs: a product of few tiles costs as much as one of many."""
    monkeypatch.setattr(dequantize, "_card", lambda _: H200)
    for outputs in (28672, 11008, 14336, 128256):
        rows = dequantize.rows_of(4096, outputs, 4096, 128, device)
        last = outputs - (-(-outputs // rows) - 1) * rows
        assert last > 0.5 * rows


def test_rows_of_a_slab_can_be_read_16_bytes_at_a_time(device):
    like = torch.empty(0, dtype=F16, device=device)
    assert dequantize.empty_slab(5, 77, like).stride() == (80, 1)


def test_a_cpu_has_the_definition(random_weight, device, monkeypatch):
    """Where neither a GPU nor the interpreter is, weights are decoded in torch."""
    operands = operands_of(random_weight(40, 96, 32), F16, device)
    expected = affine.decode_all(operands)
    monkeypatch.setattr(configs, "card", None)
    monkeypatch.setattr("qplug_kernels.gpu.compat.interpreted", lambda: False)
    if device.type == "cpu":
        assert torch.equal(affine.decode_all(operands), expected)
