"""The layout of words: equal to the literal execution of its `Layout`, in shards and slabs too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_converters import codec
from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels import Problem
from qplug_kernels.gpu import planes
from qplug_kernels.gpu.form import Form, effective_group

FORM = Form(
    out_features=0, in_features=0, places=0, bits=4, rows=16, columns=16, group=16, bf16=False,
    bf16_scales=False,
)  # fmt: skip


@st.composite
def forms(draw):
    bits = draw(st.sampled_from((2, 3, 4, 8)))
    form = replace(
        FORM, bits=bits, rows=draw(st.sampled_from((2, 16))), columns=draw(st.sampled_from((1, 4)))
    )
    tiles = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, k = tiles[0] * form.columns, tiles[1] * form.tile
    n -= draw(st.integers(0, form.columns - 1))
    k -= draw(st.integers(0, form.tile - 1))
    return replace(form, out_features=n, in_features=k, places=k)


def draw_codes(form):
    return torch.randint(0, 1 << form.bits, (form.out_features, form.in_features)).to(torch.uint8)


@given(forms())
def test_pack_is_the_layout(form):
    codes = draw_codes(form)
    rows, columns = (t * n for t, n in zip(form.tiles, (form.columns, form.tile), strict=True))
    padded = planes.pad(codes, rows, columns)
    [part] = form.layout()
    sizes = {"out": rows, "inp": columns, "group": 1}
    words = planes.pack(codes, form)
    assert torch.equal(words, codec.pack_part(part, padded))
    assert part.spec(sizes).shape == words.shape
    assert torch.equal(codec.unpack_part(part, words, sizes), padded)
    assert torch.equal(planes.unpack(words, form), padded)


@given(forms(), st.data())
@settings(max_examples=50)
def test_a_shard_of_whole_tiles_packs_to_tiles_of_the_whole(form, data):
    codes = draw_codes(form)
    words = planes.pack(codes, form)
    for axis, size in ((0, form.columns), (1, form.tile)):
        first = data.draw(st.integers(0, form.tiles[axis] - 1))
        last = data.draw(st.integers(first + 1, form.tiles[axis]))
        shard = codes.narrow(axis, first * size, min(last * size, codes.shape[axis]) - first * size)
        n, k = shard.shape
        packed = planes.pack(shard, replace(form, out_features=n, in_features=k, places=k))
        assert torch.equal(packed, words.narrow(axis, first, last - first))


def test_slabs_change_nothing(monkeypatch):
    form = replace(FORM, out_features=100, in_features=200, places=200)
    codes = draw_codes(form)
    whole = planes.pack(codes, form)
    for slab in (1, 16 * 256, 3 * 16 * 256):
        monkeypatch.setattr(planes, "SLAB", slab)
        assert torch.equal(planes.pack(codes, form), whole)


@pytest.mark.parametrize(
    ("unit", "tile", "count", "group"),
    [
        (128, 256, 4096, 128),
        (256, 256, 4096, 256),
        (1024, 256, 4096, 1024),
        (768, 256, 4096, 256),  # three tiles: no power of two
        (96, 256, 960, 32),
        (4096, 256, 4096, 4096),
        (11008, 256, 11008, 11008),
        (1000, 256, 1000, 1024),  # all inputs, padded to whole tiles
        (16, 64, 4096, 16),
    ],
)
def test_effective_group(unit, tile, count, group):
    assert effective_group(unit, tile, count) == group


def weight(n, k, group_size, bits=4, g_idx=None, scale_dtype=torch.float16):
    groups = -(-k // group_size)
    scales = (torch.rand(n, groups) * 0.02 + 1e-3).to(scale_dtype)
    zeros = torch.randint(0, (1 << bits) + 1, (n, groups), dtype=torch.int16)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    return QuantizedWeight(codes, bits, AffineGrid(scales, zeros, group_size, g_idx))


def encode(weight, dtype=torch.float16):
    problem = Problem.here(weight, dtype)
    places = planes.arrange(weight, problem)
    form = planes.choose_form(weight, problem, places)
    return form, planes.encode(weight, form, places)


def decoded(form, operands):
    return planes.dequantize(form, list(operands.values())).float().to(form.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_weights_come_back(bits, symmetric, dtype, monkeypatch):
    monkeypatch.setattr(planes, "SLAB", 4 * 128 * 512)
    for n, k, group_size in ((130, 320, 128), (40, 100, 100), (3, 96, 96)):
        for scale_dtype in (torch.float16, torch.bfloat16):
            one = weight(n, k, group_size, bits, scale_dtype=scale_dtype)
            if symmetric:
                one.grid.zeros.fill_(1 << (bits - 1))
            form, operands = encode(one, dtype)
            assert form.symmetric == (symmetric and form.bits == bits and form.group < form.tile)
            assert Form.of(list(operands.values())) == form
            planes.check_operands(form, list(operands.values()))
            assert torch.equal(decoded(form, operands), one.dequantize().to(dtype))


def irregular(k, groups):
    """Groups of any number of inputs: a shard of a linear in act order."""
    return torch.randint(0, groups, (k,), dtype=torch.int32)


def regular(k, group_size):
    return (torch.arange(k, dtype=torch.int32) // group_size)[torch.randperm(k)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("g_idx", [regular(512, 128), regular(320, 64), irregular(300, 3)])
def test_act_order_comes_back(g_idx, bits):
    groups = int(g_idx.max()) + 1
    one = weight(40, len(g_idx), -(-len(g_idx) // groups), bits, g_idx)
    form, operands = encode(one)
    assert torch.equal(decoded(form, operands), one.dequantize().half())
    order = operands["order"]
    assert sorted(order[order >= 0].tolist()) == list(range(len(g_idx)))


def test_groups_of_an_irregular_order_are_filled_up():
    g_idx = torch.tensor([0] * 17 + [2] * 3 + [1] * 44, dtype=torch.int32)
    one = weight(16, 64, 32, g_idx=g_idx)
    one = replace(
        one, grid=AffineGrid(*(torch.ones(16, 3).half(), torch.ones(16, 3).short()), 32, g_idx)
    )
    places = planes.arrange(one, Problem.here(one, torch.float16))
    assert places.unit == 16
    assert torch.bincount(places.groups).tolist() == [32, 48, 16]
    assert (places.order < 0).sum() == 32 + 48 + 16 - 64


def test_the_numbers_of_the_largest_linears_fit_a_shape():
    form = replace(
        FORM, out_features=1 << 18, in_features=1 << 17, places=1 << 17, group=1 << 17, bits=8,
        rows=128, columns=128,
    )  # fmt: skip
    words = torch.empty((1, 512, 1, 128, 128), dtype=torch.int16, device="meta")
    assert Form.of([words, words.int(), form.tensor("cpu")]) == form


def test_sizes():
    """Exactly bits / 8 bytes per weight, and 4 for each group."""
    for bits, size in ((2, 0.25), (3, 0.375), (4, 0.5), (8, 1)):
        _, operands = encode(weight(256, 1024, 128, bits))
        assert operands["words"].nbytes == size * 256 * 1024
        assert operands["scales"].nbytes == 4 * 256 * 8
        one = weight(256, 1024, 128, bits)
        one.grid.zeros.fill_(1 << (bits - 1))
        assert encode(one)[1]["scales"].nbytes == 2 * 256 * 8


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: o | {"words": o["words"].int()}, "words is torch.int32"),
        (lambda o: o | {"scales": o["scales"][:, :1]}, r"scales is .*, expected .*\[2, 2, 128, 2"),
        (lambda o: o | {"words": o["words"].transpose(3, 4)}, "words is torch.int16"),
        (lambda o: o | {"scales": o["scales"].transpose(0, 1).contiguous().transpose(0, 1)},
         "scales is not in one piece"),
    ],
)  # fmt: skip
def test_wrong_operands(spoil, message):
    form, operands = encode(weight(130, 320, 128))
    with pytest.raises(ValueError, match=message):
        planes.check_operands(form, list(spoil(operands).values()))


def test_what_the_layout_cannot_hold():
    problem = Problem(in_features=128, out_features=64, group_size=8)
    assert "groups of 8 inputs are no multiple of 16" in (planes.cannot(problem) or "")
    problem = Problem(
        in_features=128, out_features=64, scale_dtype=torch.float32, scales_fit_f16=False
    )
    assert "outside the range of float16" in (planes.cannot(problem) or "")
