"""Least-squares fits: never worse than min/max, near the optimum, exact where that is possible."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug.quantizers import rtn
from qplug_converters import fit, least_squares
from qplug_converters.errors import QplugError
from qplug_converters.fit import errors, fit_affine, fit_codebook, fit_rows
from qplug_converters.scheme import Scheme
from qplug_converters.weight import AffineGrid, QuantizedWeight

NF4 = torch.frombuffer(
    bytearray.fromhex(
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    )[::-1],
    dtype=torch.float32,
).flip(0)
FP4 = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
FP4 = torch.cat([FP4, -FP4])
TABLES = {"nf4": NF4, "fp4": FP4}
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

seeds = st.integers(0, 1 << 16)
kinds = st.sampled_from(
    ["normal", "outliers", "zeros", "constant", "positive", "negative", "levels", "mixed"]
)
exponents = st.integers(-30, 6)


def weights(kind: str, seed: int, exponent: int, rows: int, inp: int) -> Tensor:
    """Draw a weight; `mixed` has a row of every other kind."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, inp, generator=g)
    each = {
        "normal": normal,
        "outliers": normal.where(torch.rand(rows, inp, generator=g) > 0.02, normal * 100),
        "zeros": torch.zeros(rows, inp),
        "constant": normal[:, :1].expand(rows, inp).contiguous(),
        "positive": normal.abs(),
        "negative": -normal.abs() - 3,
        "levels": torch.randint(-3, 4, (rows, inp), generator=g).float(),
    }
    if kind == "mixed":
        each["mixed"] = torch.stack([list(each.values())[i % 7][i] for i in range(rows)])
    return each[kind] * 2.0**exponent


schemes = st.builds(
    lambda bits, size, sym, dtype, low, high: (bits, size, sym, dtype, (low, (1 << bits) - high)),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([8, 32, 48, 96]),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 1]),
)


@settings(max_examples=50, deadline=None)
@given(schemes, kinds, seeds, exponents)
def test_affine(
    drawn: tuple[int, int, bool, str, tuple[int, int]], kind: str, seed: int, exponent: int
) -> None:
    bits, size, sym, dtype, zeros = drawn
    weight = weights(kind, seed, exponent, 7, 96)
    call = {"bits": bits, "group_size": size, "sym": sym, "zeros": zeros}
    got = fit_affine(weight, scale_dtype=DTYPES[dtype], **call)  # type: ignore[arg-type]
    result, grid = got.result, got.result.grid

    assert result.codes.dtype == torch.uint8
    assert result.codes.shape == weight.shape
    assert int(result.codes.max()) < 1 << bits
    assert grid.scales.dtype == DTYPES[dtype]
    assert bool(torch.isfinite(grid.scales).all())
    assert float(grid.scales.min()) >= fit.SMALLEST
    low, high = (1 << (bits - 1),) * 2 if sym else (zeros[0], min(zeros[1], (1 << bits) - 1))
    assert low <= int(grid.zeros.min()) <= int(grid.zeros.max()) <= high

    sse, sumsq = errors(weight, result.dequantize())
    assert got.sse == pytest.approx(sse, rel=1e-9)
    assert got.sumsq == pytest.approx(sumsq, rel=1e-9)
    assert got.sse <= got.sse_minmax
    plain = rtn.quantize(weight, Scheme(7, 96, bits, size, sym=sym, scale_dtype=dtype), zeros)
    assert got.sse_minmax == pytest.approx(errors(weight, plain.dequantize())[0], rel=1e-9)
    per_group = (weight - result.dequantize()).double().square().view(7, -1, size).sum(2)
    before = (weight - plain.dequantize()).double().square().view(7, -1, size).sum(2)
    assert bool((per_group <= before * (1 + 1e-9)).all())

    halves = [fit_affine(w, scale_dtype=DTYPES[dtype], **call) for w in (weight[:3], weight[3:])]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([h.result.codes for h in halves]), result.codes)
    assert torch.equal(torch.cat([h.result.grid.scales for h in halves]), grid.scales)
    assert torch.equal(torch.cat([h.result.grid.zeros for h in halves]), grid.zeros)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    size=st.sampled_from([64, 32, 24]),
    exponent=st.integers(-22, 3),
    seed=seeds,
)
def test_exact_recovery(
    data: st.DataObject, bits: int, sym: bool, dtype: str, size: int, exponent: int, seed: int
) -> None:
    """What lies on a grid of groups of 64 (or 48) comes back, in parts of those groups too."""
    g = torch.Generator().manual_seed(seed)
    whole = 48 if size == 24 else 64
    shape = (9, 3)
    scales = ((1 + torch.rand(shape, generator=g)) * 2.0**exponent).to(DTYPES[dtype])
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    zeros = torch.randint(0, top + 1, shape, generator=g)
    zeros = torch.full_like(zeros, middle) if sym else zeros
    # Few levels of the grid in use, somewhere: min/max alone then takes another scale.
    few = data.draw(st.integers(1, top + 1))
    codes = torch.randint(0, few, (9, 3 * whole), generator=g)
    codes += data.draw(st.integers(0, top + 1 - few))
    grid = AffineGrid(scales, zeros.to(torch.int16), whole)
    weight = QuantizedWeight(codes.to(torch.uint8), bits, grid).dequantize()
    got = fit_affine(
        weight, bits=bits, group_size=size, sym=sym, scale_dtype=DTYPES[dtype], zeros=(0, top)
    )
    assert got.sse == 0
    assert torch.equal(got.result.dequantize(), weight)


@pytest.mark.parametrize("size", [64, 32])
def test_exact_from_eight_bits_and_from_another_order(size: int) -> None:
    """8-bit codes that use few levels fit 4 bits; a permutation inside groups does no harm."""
    g = torch.Generator().manual_seed(size)
    scales = (torch.rand(16, 4, generator=g) * 0.01 + 0.001).half()
    codes = (torch.randint(-8, 8, (16, 4, 64), generator=g) * 16 + 128).clamp(max=255)
    codes = codes[:, :, torch.randperm(64, generator=g)].view(16, 256).to(torch.uint8)
    zeros = torch.full((16, 4), 128, dtype=torch.int16)
    weight = QuantizedWeight(codes, 8, AffineGrid(scales, zeros, 64)).dequantize()
    for sym in (True, False):
        got = fit_affine(
            weight, bits=4, group_size=size, sym=sym, scale_dtype=torch.float16, zeros=(0, 15)
        )
        assert got.sse == 0
        assert got.sse_minmax > 0 or not sym


@pytest.mark.parametrize(("sym", "gain"), [(True, 0.168), (False, 0.162)])
def test_gain_over_minmax(sym: bool, gain: float) -> None:
    """On normal weights, 4 bits and groups of 128; 4000 grids a group would gain 0.001 more."""
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(1))
    got = fit_affine(
        weight, bits=4, group_size=128, sym=sym, scale_dtype=torch.float16, zeros=(0, 15)
    )
    assert 1 - got.sse / got.sse_minmax > gain


def optimum(weight: Tensor, bits: int, zeros: list[int]) -> Tensor:
    """Return the least possible error of each row as one group: all codes, all zeros."""
    wide = weight.double()
    codes = torch.tensor(
        list(itertools.product(range(1 << bits), repeat=weight.shape[1])), dtype=torch.float64
    )
    explained = torch.zeros(len(wide), dtype=torch.float64)
    for zero in zeros:
        steps = codes - zero
        along = (wide @ steps.T).clamp(min=0)  # a scale is positive
        gain = along.square() / steps.square().sum(1).clamp(min=1)
        explained = torch.maximum(explained, gain.amax(1))
    return wide.square().sum(1) - explained


@pytest.mark.parametrize("sym", [True, False])
def test_near_the_optimum(sym: bool) -> None:
    """2 bits, groups of 4: 9 in 10 groups reach the optimum; the sum is within 5 %."""
    weight = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    got = fit_affine(weight, bits=2, group_size=4, sym=sym, scale_dtype=torch.float32, zeros=(0, 3))
    reached = (weight - got.result.dequantize()).double().square().sum(1)
    best = optimum(weight, 2, [2] if sym else [0, 1, 2, 3])
    squares = weight.double().square().sum(1)
    assert bool((reached >= best - 1e-6 * squares).all())
    assert float(reached.sum()) < 1.05 * float(best.sum())
    assert float((reached <= best + 1e-6 * squares).double().mean()) > 0.9
    assert got.sse_minmax > 1.4 * float(best.sum())


def test_least_squares_is_that_of_lstsq() -> None:
    """The zero moves by the intercept of w on the codes, the scale is then that of new levels."""
    g = torch.Generator().manual_seed(11)
    values = torch.randn(64, 200, generator=g) + torch.linspace(-3, 3, 200)  # clipped on one side
    scale, zero, span = torch.full((200,), 0.25), torch.full((200,), 8.0), (2, 14)
    groups = least_squares._Moments(values, values.sum(0), values.square().sum(0))
    _, found, moved = groups.regress(
        (scale, zero),
        least_squares.Integers(15),
        span,
        torch.float32,
        torch.empty(3 * values.numel()),
    )
    levels = (values / 0.25).round().clamp(-8, 7).double()
    for group in range(200):
        c, w = levels[:, group], values[:, group].double()
        line = torch.stack([c, torch.ones_like(c)], 1)
        slope, intercept = torch.linalg.lstsq(line, w[:, None]).solution.view(-1).tolist()
        assert moved[group] == min(14, max(2, 8 + round(-intercept / slope)))
        new = c - (float(moved[group]) - 8)
        assert float(found[group]) == pytest.approx(float(w @ new / (new @ new)), rel=1e-4)
    assert len(moved.unique()) > 4


def test_short_last_group_is_a_group_of_its_own() -> None:
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(3))
    call = {"bits": 4, "sym": False, "scale_dtype": torch.float16, "zeros": (1, 15)}
    whole = fit_affine(weight, group_size=64, **call).result  # type: ignore[arg-type]
    tail = fit_affine(weight[:, 64:], group_size=36, **call).result  # type: ignore[arg-type]
    assert torch.equal(whole.codes[:, 64:], tail.codes)
    assert torch.equal(whole.grid.scales[:, 1:], tail.grid.scales)
    assert torch.equal(whole.grid.zeros[:, 1:], tail.grid.zeros)


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 13, 1 << 22])
def test_cutting_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Neither blocks nor torch's threads change a code, a scale or a zero."""
    weight = weights("mixed", 5, -4, 70, 1000)

    def all_fits() -> list[Tensor]:
        affine = fit_affine(
            weight, bits=4, group_size=96, sym=False, scale_dtype=torch.float16, zeros=(0, 15)
        ).result
        rows, book = fit_rows(weight).result, fit_codebook(weight, table=NF4, blocksize=64).result
        return [affine.codes, affine.grid.scales, affine.grid.zeros, *rows, *book]

    before = all_fits()
    monkeypatch.setattr(fit, "_CHUNK", chunk)
    monkeypatch.setattr(fit, "_FEWEST", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        after = all_fits()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def blocks_of(result: tuple[Tensor, Tensor], table: Tensor, blocksize: int) -> Tensor:
    """Dequantize as formats.md's flat rule."""
    codes, absmax = result
    flat = table[codes.reshape(-1).long()]
    return (flat * absmax.repeat_interleave(blocksize)[: flat.numel()]).view(codes.shape)


@tables
@settings(max_examples=25, deadline=None)
@given(kind=kinds, seed=seeds, exponent=exponents, inp=st.sampled_from([96, 64, 33]))
def test_codebook(table: Tensor, kind: str, seed: int, exponent: int, inp: int) -> None:
    weight = weights(kind, seed, exponent, 9, inp)
    got = fit_codebook(weight, table=table, blocksize=64)
    codes, absmax = got.result
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert int(codes.max()) < 16
    assert absmax.shape == (math.ceil(weight.numel() / 64),)
    assert bool(torch.isfinite(absmax).all())
    assert float(absmax.min()) >= 0
    approx = blocks_of(got.result, table, 64)
    sse, sumsq = errors(weight, approx)
    assert got.sse == pytest.approx(sse, rel=1e-9)
    assert got.sumsq == pytest.approx(sumsq, rel=1e-9)
    assert got.sse <= got.sse_minmax

    # Each code is a nearest one, and plain absmax is what it says.
    spread = absmax.repeat_interleave(64)[: weight.numel()].view(weight.shape)
    nearest = (spread[..., None] * table - weight[..., None]).abs().amin(-1)
    assert bool(((approx - weight).abs() <= nearest * (1 + 1e-5) + spread * 1e-6).all())
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64)
    plain = flat.abs().amax(1, keepdim=True)
    best = (flat[..., None] - plain[..., None] * table).double().square().amin(-1)
    assert got.sse_minmax == pytest.approx(float(best.sum()), rel=1e-4, abs=1e-30)


@tables
def test_codebook_of_codebook_is_exact(table: Tensor) -> None:
    g = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (12, 96), generator=g, dtype=torch.uint8)
    codes.view(-1)[::64] = int(table.argmax())  # bitsandbytes' own blocks hold their absmax
    absmax = torch.rand(18, generator=g) + 0.1
    weight = blocks_of((codes, absmax), table, 64)
    got = fit_codebook(weight, table=table, blocksize=64)
    assert got.sse == got.sse_minmax == 0
    assert torch.equal(got.result[1], absmax)
    same = (got.result[0] == codes) | (table[codes.long()] == 0)  # FP4 has two zeros
    assert bool(same.all())


def test_codebook_thresholds_are_those_of_bitsandbytes() -> None:
    """On a threshold the lower value is taken, or in FP4 the lower magnitude (csrc/kernels.cu)."""
    above = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544]
    above += [-0.23460740596055984, -0.13791173323988914, -0.045525018125772476]
    above += [0.03979014977812767, 0.1202552504837513, 0.2035212516784668, 0.2920137718319893]
    above += [0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    at = torch.tensor([*above, 1.0])
    levels = fit.Table(NF4)
    one = torch.ones(1)
    assert levels.codes(at[:, None], one).view(-1).tolist() == list(range(16))
    up = torch.nextafter(at, torch.tensor(2.0))[:15]
    assert levels.codes(up[:, None], one).view(-1).tolist() == list(range(1, 16))

    order = [0, 1, 6, 7, 4, 5, 2, 3]
    middles = (FP4[order][1:] + FP4[order][:-1]) / 2
    levels = fit.Table(FP4)
    assert levels.codes(middles[:, None], one).view(-1).tolist() == order[:-1]
    assert levels.codes(-middles[:, None], one).view(-1).tolist() == [8 + c for c in order[:-1]]


@settings(max_examples=25, deadline=None)
@given(kind=kinds, seed=seeds, exponent=exponents, rows=st.sampled_from([1, 9]))
def test_rows(kind: str, seed: int, exponent: int, rows: int) -> None:
    weight = weights(kind, seed, exponent, rows, 200)
    got = fit_rows(weight)
    codes, scb = got.result
    assert codes.dtype == torch.uint8
    assert scb.shape == (rows,)
    assert bool(torch.isfinite(scb).all())
    signed = codes.to(torch.int16) - 128
    assert int(signed.abs().max()) <= 127
    inverse = torch.tensor(0.007874015718698502)
    approx = signed * scb[:, None] * inverse
    assert got.sse == pytest.approx(errors(weight, approx)[0], rel=1e-9)
    assert got.sse <= got.sse_minmax
    absmax = weight.abs().amax(1, keepdim=True)
    plain = (weight / absmax.clamp(min=1e-30) * 127).round() * absmax * inverse
    assert got.sse_minmax == pytest.approx(errors(weight, plain)[0], rel=1e-3, abs=1e-30)


def test_rows_find_a_coarse_grid() -> None:
    """A 4-bit channelwise weight is on no min/max int8 grid, but on one all the same."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randint(-8, 8, (6, 512), generator=g) * (torch.rand(6, 1, generator=g) + 0.5)
    got = fit_rows(weight)
    assert got.sse < 1e-13 * got.sumsq < 1e-6 * got.sse_minmax


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(QplugError, match="not finite"):
        fit_affine(
            weight, bits=4, group_size=64, sym=True, scale_dtype=torch.float16, zeros=(0, 15)
        )
    with pytest.raises(QplugError, match="not finite"):
        fit_rows(weight)
    with pytest.raises(QplugError, match="not finite"):
        fit_codebook(weight, table=NF4, blocksize=64)


def test_a_scale_that_float16_cannot_hold() -> None:
    weight = torch.full((2, 64), 1e6)
    with pytest.raises(QplugError) as caught:
        fit_affine(
            weight, bits=4, group_size=64, sym=True, scale_dtype=torch.float16, zeros=(0, 15)
        )
    assert caught.value.where == "scales"
