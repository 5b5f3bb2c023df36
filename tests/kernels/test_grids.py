"""Every kind of grid: the kernels that serve it against float64, what is refused, what is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_converters.scheme import Kind
from qplug_converters.weight import (
    AffineGrid,
    CodebookGrid,
    NestedAbsmax,
    OffsetGrid,
    QuantizedWeight,
    RowGrid,
)
from qplug_kernels import KERNELS, Problem, apply_linear, choose, prepare

BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-7}
"""Relative Frobenius error of a product; the checkpoint's own float32 roundings are part of it."""

TABLE = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0,
                      0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])  # fmt: skip


def codes_of(rows, columns, bits=4):
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)


def codebook(rows, columns, blocksize, skip=0):
    absmax = torch.rand(-(-(skip + rows * columns) // blocksize)) * 0.1 + 0.01
    grid = CodebookGrid(TABLE.clone(), absmax, blocksize, skip=skip)
    return QuantizedWeight(codes_of(rows, columns), 4, grid)


def nested(rows, columns, blocksize):
    weight = codebook(rows, columns, blocksize)
    blocks = len(weight.grid.absmax)
    inner = NestedAbsmax(
        codes_of(1, blocks, 8)[0], torch.rand(-(-blocks // 4)) * 0.1, torch.rand(256), 0.05, 4
    )
    return replace(weight, grid=replace(weight.grid, absmax=inner.absmax(), nested=inner))


def offset(rows, columns, group_size):
    scales = (torch.rand(rows, columns // group_size) * 0.02 + 1e-3).half()
    offsets = -(scales.float() * torch.randint(0, 16, scales.shape)).half()
    return QuantizedWeight(codes_of(rows, columns), 4, OffsetGrid(scales, offsets, group_size))


def int8_rows(rows, columns):
    return QuantizedWeight(codes_of(rows, columns, 8), 8, RowGrid(torch.rand(rows) + 0.1))


WEIGHTS = {
    "codebook": lambda: codebook(32, 128, 64),
    "blocks span rows": lambda: codebook(7, 36, 64),
    "first block begun before": lambda: codebook(6, 40, 64, skip=40),
    "nested": lambda: nested(32, 128, 32),
    "offset": lambda: offset(48, 128, 64),
    "rows": lambda: int8_rows(24, 40),
}


def meaning(weight):
    """The formula, weight by weight, in Python's floats."""
    grid, (rows, columns) = weight.grid, weight.codes.shape
    exact = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            code = int(weight.codes[n, k])
            if isinstance(grid, CodebookGrid):
                block = (grid.skip + n * columns + k) // grid.blocksize
                exact[n, k] = float(grid.table[code]) * float(grid.absmax[block])
            elif isinstance(grid, OffsetGrid):
                g = k // grid.group_size
                exact[n, k] = code * float(grid.scales[n, g]) + float(grid.offsets[n, g])
            else:
                exact[n, k] = (code - 128) * float(grid.absmax[n]) / 127
    return exact


def relative(found, expected):
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_against_float64(kernel, name, monkeypatch):
    monkeypatch.setenv("QPLUG_KERNEL", kernel)
    weight = WEIGHTS[name]()
    exact = meaning(weight)
    for dtype, bound in BOUND.items():
        prepared = prepare(weight, dtype)
        bias = torch.randn(weight.out_features).to(dtype)
        for tokens in (1, 30):
            x = torch.randn(tokens, weight.in_features).to(dtype).requires_grad_()
            found = apply_linear(x, prepared, bias)
            assert found.dtype == dtype
            assert relative(found, x.detach().double() @ exact.T + bias.double()) < bound
            grad = torch.randn_like(found)
            found.backward(grad)
            assert relative(x.grad, grad.double() @ exact) < bound


@pytest.mark.parametrize("name", WEIGHTS)
def test_dense_is_the_checkpoints_meaning_rounded_once(name):
    weight = WEIGHTS[name]()
    for dtype in BOUND:
        prepared = prepare(weight, dtype)
        if prepared.kernel == "dense":
            assert torch.equal(prepared.dense_weight, weight.dequantize().to(dtype))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_changed_number_changes_the_product(name, monkeypatch):
    """Of codes and of every tensor of the grid, in the last place."""
    monkeypatch.setenv("QPLUG_KERNEL", "reference")
    weight = WEIGHTS[name]()
    x = torch.rand(2, weight.in_features, dtype=torch.float64) + 0.5
    before = apply_linear(x, prepare(weight, torch.float64))
    weight.codes[-1, -1] ^= 1
    assert not torch.equal(apply_linear(x, prepare(weight, torch.float64)), before)
    weight.codes[-1, -1] ^= 1
    for field in ("table", "absmax", "scales", "offsets"):
        tensor = getattr(weight.grid, field, None)
        if tensor is None:
            continue
        flat = tensor.view(-1)
        at = int(weight.codes[-1, -1]) if field == "table" else -1
        kept = flat[at].clone()
        flat[at] = kept + 0.5
        assert not torch.equal(apply_linear(x, prepare(weight, torch.float64)), before)
        flat[at] = kept
    assert torch.equal(apply_linear(x, prepare(weight, torch.float64)), before)


@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_offsets_stay_packed_on_a_cpu(group_size, monkeypatch):
    monkeypatch.setenv("QPLUG_KERNEL", "cpu_int4")
    weight = offset(48, 2 * 96 if group_size == 96 else 256, group_size)
    if reason := next(k for k in KERNELS if k.name == "cpu_int4").cannot(
        Problem.here(weight, torch.bfloat16)
    ):
        pytest.skip(reason)
    prepared = prepare(weight, torch.bfloat16)
    exact = meaning(weight)
    for tokens in (1, 40):  # both of its copies
        x = torch.randn(tokens, weight.in_features).bfloat16()
        assert relative(apply_linear(x, prepared), x.double() @ exact.T) < BOUND[torch.bfloat16]
    before = apply_linear(x, prepared)
    weight.grid.offsets[-1, -1] += 0.5
    assert not torch.equal(apply_linear(x, prepare(weight, torch.bfloat16)), before)


@pytest.mark.parametrize("name", ["codebook", "rows"])
def test_integer_kernels_refuse_other_grids_with_their_name(name):
    problem = Problem.here(WEIGHTS[name](), torch.bfloat16)
    for kernel in KERNELS:
        if kernel.name.startswith("cpu_int4"):
            assert kernel.cannot(problem) == (
                f"the grid is of the kind `{name}`, and the operation needs `affine`"
            )
    assert choose(problem).kernel.name == "dense"


def test_the_warning_names_the_kind(caplog):
    with caplog.at_level(logging.INFO, "qplug"):
        prepare(codebook(32, 128, 64), torch.bfloat16)
    assert "4-bit linears (codebook) on cpu are decoded to dense bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "group_size", "block"),
    [
        ("codebook", Kind.CODEBOOK, 64, 64),
        ("blocks span rows", Kind.CODEBOOK, 64, 4),
        ("first block begun before", Kind.CODEBOOK, 64, 8),
        ("nested", Kind.CODEBOOK, 32, 32),
        ("offset", Kind.OFFSET, 64, 64),
        ("rows", Kind.ROWS, 40, 40),
    ],
)
def test_what_selection_hears(name, kind, group_size, block):
    here = Problem.here(WEIGHTS[name](), torch.float16)
    assert (here.kind, here.group_size, here.block) == (kind, group_size, block)
    assert here.table == (tuple(TABLE.tolist()) if kind is Kind.CODEBOOK else ())
    assert not here.act_order
    assert here.scales_fit_f16
    assert here.weights_fit_bf16


def test_what_overflows_or_vanishes_is_heard():
    weight = codebook(8, 64, 64)
    weight.grid.absmax[3] = 1e-9
    assert not Problem.here(weight, torch.float16).scales_fit_f16
    weight.grid.absmax[3] = 3.4e38
    assert not Problem.here(weight, torch.bfloat16).weights_fit_bf16
    weight = int8_rows(8, 64)
    weight.grid.absmax[3] = 1e7
    here = Problem.here(weight, torch.float16)
    assert (here.scales_fit_f16, here.offsets_fit_f16) == (False, False)
    weight = offset(8, 64, 64)
    wide = OffsetGrid(weight.grid.scales.float(), weight.grid.offsets.float() * 1e9, 64)
    assert not Problem.here(replace(weight, grid=wide), torch.float16).offsets_fit_f16


def broken():
    """Weights that contradict themselves, and what is said of each."""
    book, off, rows = codebook(8, 64, 64), offset(8, 64, 32), int8_rows(8, 64)
    affine = AffineGrid(torch.ones(8, 2), torch.zeros(8, 2, dtype=torch.int16), 32)
    nan = book.grid.absmax.clone()
    nan[2] = float("nan")
    return {
        "codes of integers": (replace(book, codes=book.codes.int()), "codes torch.int32"),
        "codes too large": (replace(book, codes=book.codes + 16), "a code of 31"),
        "table": (replace(book, grid=replace(book.grid, table=TABLE[:8])), r"table \[8\]"),
        "absmax": (
            replace(book, grid=replace(book.grid, absmax=book.grid.absmax[1:])),
            r"absmax \[7\], expected \[8\]",
        ),
        "skip": (replace(book, grid=replace(book.grid, skip=64)), "64 weights lie before"),
        "nan": (replace(book, grid=replace(book.grid, absmax=nan)), "1 absmax that are NaN"),
        "elsewhere": (
            replace(book, grid=replace(book.grid, absmax=book.grid.absmax.to("meta"))),
            "absmax on meta",
        ),
        "bits of rows": (replace(rows, bits=7, codes=rows.codes // 2), "7-bit rows, expected 8"),
        "absmax of rows": (
            replace(rows, grid=RowGrid(rows.grid.absmax[None])),
            r"absmax \[1, 8\], expected \[8\]",
        ),
        "offsets": (
            replace(off, grid=OffsetGrid(off.grid.scales, off.grid.offsets[:, :1], 32)),
            r"offsets \[8, 1\]",
        ),
        "groups of offsets": (
            replace(off, grid=OffsetGrid(off.grid.scales, off.grid.offsets, 16)),
            "2 groups of 16",
        ),
        "short group of offsets": (
            replace(off, grid=OffsetGrid(off.grid.scales, off.grid.offsets, 48)),
            "64 inputs in groups of 48",
        ),
        "zeros": (
            replace(off, grid=replace(affine, zeros=affine.zeros + 17)),
            "zeros from 17 to 17, expected 0 to 16",
        ),
        "infinite scales": (
            replace(off, grid=replace(affine, scales=affine.scales / 0)),
            "16 scales that are NaN or infinite",
        ),
    }


@pytest.mark.parametrize("name", broken())
def test_a_weight_that_contradicts_itself(name):
    weight, said = broken()[name]
    with pytest.raises(QplugError, match=said):
        prepare(weight, torch.float32)
