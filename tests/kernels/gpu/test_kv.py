"""Keys and values in 8 bits: the bits, where they go, what is refused.

The kernel runs in Triton's interpreter, or on a GPU where there is one. `encode` and the operations
on a CPU are what it must equal bit by bit; `encode` itself must be the nearest of all 256 codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug_kernels.gpu import kv as gpu
from qplug_kernels.gpu.configs import card
from qplug_kernels.kv import (
    CODES,
    SMALLEST_SCALE,
    dynamic_scales,
    encode,
    kv_scatter,
    kv_scatter_dynamic,
)

DTYPES = list(CODES)
SOURCES = [torch.float16, torch.bfloat16, torch.float32]
POISON = 0xA5


def names(dtypes: list[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


every_code = pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))


def numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a code, ascending, float64."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    return codes[codes.isfinite()].unique()


def hard(dtype: torch.dtype) -> Tensor:
    """Float32 where rounding is decided: codes, midpoints, their neighbours; and the extremes."""
    exact = numbers(dtype)
    middle = ((exact[1:] + exact[:-1]) / 2).float()
    some = torch.cat((exact.float(), middle))
    infinity = torch.tensor(torch.inf)
    below, above = torch.nextafter(some, -infinity), torch.nextafter(some, infinity)
    biggest = torch.finfo(torch.float32).max
    extremes = torch.tensor([0.0, -0.0, torch.nan, torch.inf, biggest, 1e-45, 2.0**-126, 1e30])
    return torch.cat((some, below, above, extremes, -extremes))


def anything(count: int) -> Tensor:
    """Float32 of random bits."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).int().view(torch.float32)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


CPU = torch.device("cpu")


def write(
    kernel: bool,
    key: Tensor,
    value: Tensor,
    caches: list[Tensor],
    slots: Tensor,
    scales: list[Tensor],
    dynamic: bool,
) -> None:
    """Run the kernel, or the operation of a CPU."""
    if kernel:
        operands = [tensor.to(caches[0].device) for tensor in (key, value, slots)]
        scales = [scale.to(caches[0].device) for scale in scales]
        gpu.scatter(*operands[:2], *caches, operands[2], *scales, dynamic=dynamic)
    elif dynamic:
        kv_scatter_dynamic(key, value, *caches, *scales, slots)
    else:
        kv_scatter(key, value, *caches, slots, *scales)


@every_code
def test_encode_takes_the_nearest_code(dtype: torch.dtype) -> None:
    exact = numbers(dtype)
    x = torch.cat((hard(dtype), anything(2000), torch.randn(2000) * CODES[dtype].largest))
    x = x[~x.isnan()]
    found = encode(x, dtype).double()
    # The largest number of a float with infinity has no neighbour to be rounded to: it saturates.
    wanted = x.double().clamp(exact[0], exact[-1])
    at = torch.searchsorted(exact, wanted).clamp(1, len(exact) - 1)
    low, high = exact[at - 1], exact[at]
    even = encode(low.float(), dtype).view(torch.uint8) % 2 == 0
    down = (wanted - low < high - wanted) | ((wanted - low == high - wanted) & even)
    assert torch.equal(found, torch.where(down, low, high))


@every_code
def test_encode_has_one_nan(dtype: torch.dtype) -> None:
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32)
    assert bits(encode(nans.view(torch.float32), dtype)).tolist() == [CODES[dtype].nan] * 4


@triton.jit
def codes_kernel(
    x,
    out,
    COUNT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    NAN: tl.constexpr,
    ASM: tl.constexpr,
):
    i = tl.arange(0, COUNT)
    codes = gpu.codes_of(tl.load(x + i).to(tl.float32), MANTISSA, BIAS, LARGEST, NAN, ASM)
    tl.store(out + i, codes)


def kernel_codes(x: Tensor, dtype: torch.dtype, device: torch.device, convert: bool) -> Tensor:
    count = 1 << (len(x) - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, count - len(x))).to(device)
    out = torch.empty(count, dtype=torch.uint8, device=device)
    c = gpu.constants(1, 8, 8, 1, dtype, dynamic=False, convert=convert)
    codes_kernel[(1,)](x, out, count, c["MANTISSA"], c["BIAS"], c["LARGEST"], c["NAN"], c["ASM"])
    return out.cpu()


@every_code
@pytest.mark.parametrize("source", SOURCES, ids=names(SOURCES))
def test_kernel_rounds_as_torch(
    dtype: torch.dtype, source: torch.dtype, device: torch.device
) -> None:
    """Over all float16 and all bfloat16, and float32 where rounding is decided."""
    if source == torch.float32:
        near = torch.randn(1 << 16) * CODES[dtype].largest / 3
        x = torch.cat((hard(dtype), anything(1 << 17), near, near * 2.0**-9, near * 2.0**-20))
    else:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    wanted = bits(encode(x.float(), dtype))
    for convert in {False, gpu.converts(card(device).arch)}:
        assert torch.equal(kernel_codes(x, dtype, device, convert)[: len(x)], wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_text_of_ptx(dtype: torch.dtype) -> None:
    """Run the text on four numbers: cvt puts its second operand into the low byte."""
    text = gpu.constants(1, 8, 8, 1, dtype, dynamic=False, convert=True)["ASM"]
    assert isinstance(text, str)
    registers: dict[str, Tensor] = {f"${n}": torch.randn(64) * 50 for n in range(1, 5)}
    for line in text.strip("{} ").split(";"):
        match line.replace(",", " ").replace("{", " ").replace("}", " ").split():
            case [".reg", *_] | []:
                continue
            case ["mov.b32", out, low, high]:
                registers[out] = registers[low] | registers[high] << 16
            case [op, out, high, low]:
                assert re.fullmatch(rf"cvt\.rn\.satfinite\.{CODES[dtype].ptx}x2\.f32", op)
                byte = {n: bits(encode(registers[n], dtype)).long() for n in (low, high)}
                registers[out] = byte[low] | byte[high] << 8
            case unknown:
                raise AssertionError(unknown)
    for n in range(1, 5):
        wanted = bits(encode(registers[f"${n}"], dtype)).long()
        assert torch.equal(registers["$0"] >> 8 * (n - 1) & 255, wanted)


def test_cards_that_convert() -> None:
    assert all(map(gpu.converts, ("sm_89", "sm_90", "sm_100", "sm_120")))
    assert not any(map(gpu.converts, ("cpu", "sm_75", "sm_80", "sm_86", "gfx90a", "gfx942")))


# Paged caches as engines lay them out: logical axes are blocks, places, heads, head.


def nhd(blocks: int, places: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [bytes_of(blocks, places, heads, size).view(dtype) for _ in "kv"]


def hnd(blocks: int, places: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [bytes_of(blocks, heads, places, size).transpose(1, 2).view(dtype) for _ in "kv"]


def both(blocks: int, places: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values of a block beside each other."""
    return list(bytes_of(blocks, 2, places, heads, size).view(dtype).unbind(1))


def inline(blocks: int, places: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Room for a scale behind every head, which must stay as it is."""
    return [bytes_of(blocks, places, heads, size + 4)[..., :size].view(dtype) for _ in "kv"]


def bytes_of(*shape: int) -> Tensor:
    return torch.full(shape, POISON, dtype=torch.uint8)


LAYOUTS = [nhd, hnd, both, inline]
Make = Callable[[int, int, int, int, torch.dtype], list[Tensor]]


def storage(tensor: Tensor) -> Tensor:
    found = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return found.set_(tensor.untyped_storage()).cpu()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    layout=st.sampled_from(LAYOUTS),
    scaling=st.sampled_from(["tensor", "head", "dynamic"]),
    tokens=st.integers(1, 4),
    padding=st.integers(0, 2),
    places=st.sampled_from([1, 3, 16]),
    heads=st.sampled_from([1, 2, 3, 9, 17]),
    size=st.sampled_from([1, 8, 64, 80, 128, 200]),
    short=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(torch.int8, torch.bfloat16, hnd, "head", 4, 1, 16, 9, 128, False, 0)
@example(torch.float8_e4m3fn, torch.bfloat16, both, "dynamic", 4, 1, 3, 17, 80, True, 0)
@example(torch.float8_e5m2, torch.float16, inline, "tensor", 4, 2, 3, 3, 200, False, 0)
@example(torch.float8_e4m3fnuz, torch.float32, nhd, "dynamic", 4, 1, 16, 3, 64, False, 1)
def test_kernel_equals_reference(
    device: torch.device,
    dtype: torch.dtype,
    source: torch.dtype,
    layout: Make,
    scaling: str,
    tokens: int,
    padding: int,
    places: int,
    heads: int,
    size: int,
    short: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    blocks = 4
    # A slice of fused projections: strides of tokens are not those of the heads alone.
    fused = torch.randn(tokens + padding, 2, heads, size + 3).to(source) * 3
    key, value = fused[:, 0, :, :size], fused[:, 1, :, :size]
    slots = torch.randperm(blocks * places)[:tokens]
    slots[torch.rand(len(slots)) < 0.3] = -1
    key[: len(slots)][slots < 0] = torch.nan
    key[len(slots) :] = torch.nan
    slots = slots.int() if short else slots

    results = []
    scales = [torch.rand(heads if scaling == "head" else 1) / 20 + 0.01 for _ in "kv"]
    for kernel in (False, True):
        with device if kernel else CPU:
            caches = layout(blocks, places, heads, size, dtype)
            if scaling == "dynamic":
                scales = [
                    torch.full((blocks, heads, places), torch.nan).transpose(1, 2),
                    torch.full((places, blocks, 2 * heads), torch.nan)[..., ::2].transpose(0, 1),
                ]
        write(kernel, key, value, caches, slots, scales, scaling == "dynamic")
        results.append([storage(t) for t in (*caches, *scales)])
        # What is written is where the contract says, beside the code under test.
        for cache, x, scale in zip(caches, (key, value), scales, strict=True):
            for token, slot in enumerate(slots.tolist()):
                if slot < 0:
                    continue
                there = cache[slot // places, slot % places]
                s = scale[slot // places, slot % places] if scaling == "dynamic" else scale
                s = s.cpu()
                wanted = encode(x[token].float() / s[:, None], dtype)
                assert torch.equal(bits(there), bits(wanted))
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(wanted, found)


@every_code
def test_scales_of_a_token_and_head(dtype: torch.dtype, device: torch.device) -> None:
    """Zero, NaN, infinity, the smallest and the largest: scales finite, numbers come back."""
    big, tiny = torch.finfo(torch.float32).max, 1e-42
    rows = [[0.0, -0.0], [torch.nan, 3.0], [-torch.inf, 1.0], [big, -big], [tiny, -tiny / 4]]
    x = torch.tensor([*rows, [1e-38, 1e-39], [-7.0, 1.0], [torch.nan, torch.nan]])[:, None, :]
    slots = torch.arange(len(x))
    largest = CODES[dtype].largest
    results = []
    for kernel in (False, True):
        with device if kernel else CPU:
            caches = nhd(2, 4, 1, 2, dtype)
            scales = [torch.full((2, 4, 1), torch.nan) for _ in "kv"]
        write(kernel, x, -x, caches, slots, scales, True)
        results.append([bits(tensor) for tensor in (*caches, *scales)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    found = scales[0].flatten().cpu()
    assert found.isfinite().all()
    assert found[[0, 4, 7]].tolist() == [SMALLEST_SCALE] * 3
    assert found[[1, 6]].tolist() == [float(torch.tensor(n) / largest) for n in (3.0, 7.0)]
    assert found[[2, 3]].tolist() == [float(torch.tensor(big) / largest)] * 2
    values = caches[0].float().view(8, 2).cpu()
    assert values[6, 0] == -largest
    assert values[0].eq(0).all()
    if dtype == torch.int8:
        assert values[1].tolist() == [0, largest]
    else:
        assert values[1, 0].isnan()
        assert values[1, 1] == largest
        assert values[7].isnan().all()
    assert torch.equal(found.view(2, 4, 1), dynamic_scales(x, dtype).view(2, 4, 1))


def test_offsets_beyond_two_gigabytes(device: torch.device) -> None:
    """Pages that are never touched cost nothing."""
    places, stride = 4, 3 << 29
    room = torch.empty(2 * stride + 4096, dtype=torch.uint8, device=device)
    caches = [
        room[start:].view(torch.int8).as_strided((3, places, 2, 8), (stride, 16, 8, 1))
        for start in (0, 1024)
    ]
    key, scales = torch.randn(1, 2, 8), [torch.ones(1) / 30, torch.ones(1) / 9]
    slots = torch.tensor([11], dtype=torch.int32)
    write(True, key, 2 * key, caches, slots, scales, False)
    assert torch.equal(caches[0][2, 3].cpu(), encode(key[0] / scales[0], torch.int8))
    assert torch.equal(caches[1][2, 3].cpu(), encode(2 * key[0] / scales[1], torch.int8))


def test_slots_beyond_the_cache(device: torch.device) -> None:
    """A CPU says so; the kernel writes nothing, whatever lies there."""
    key = torch.ones(2, 1, 8)
    caches = nhd(2, 4, 1, 8, torch.int8)
    slots, scale = torch.tensor([8, 7]), torch.ones(())
    with pytest.raises(IndexError, match="holds slot 8, the cache has 8"):
        kv_scatter(key, key, *caches, slots, scale, scale)
    with device:
        whole = nhd(3, 4, 1, 8, torch.int8)
    write(True, key, key, [cache[:2] for cache in whole], slots, [scale, scale], False)
    for cache in whole:
        assert cache[1, 3].eq(1).all()
        assert bits(cache).eq(POISON).sum() == bits(cache).numel() - 8


@pytest.mark.parametrize("sizes", [(192, 80), (80, 192)])
def test_values_of_another_size(sizes: tuple[int, int], device: torch.device) -> None:
    key, value = (torch.randn(3, 2, size) for size in sizes)
    slots, scale = torch.tensor([1, -1, 0]), torch.full((1,), 0.02)
    results = []
    for kernel in (False, True):
        with device if kernel else CPU:
            caches = [nhd(1, 2, 2, size, torch.float8_e4m3fn)[0] for size in sizes]
        write(kernel, key, value, caches, slots, [scale, scale], False)
        results.append([bits(cache) for cache in caches])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_to_write(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kv_kernel", None)  # a grid of 0 is an error on a GPU
    caches = nhd(2, 2, 1, 8, torch.int8)
    scales = [torch.zeros(2, 2, 1) if dynamic else torch.ones(1) for _ in "kv"]
    key, slots = torch.empty(0, 1, 8), torch.empty(0, dtype=torch.int64)
    for kernel in (False, True):
        write(kernel, key, key, caches, slots, scales, dynamic)
    assert all(bits(cache).eq(POISON).all() for cache in caches)


def operands() -> dict[str, Tensor]:
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    key_cache, value_cache = nhd(2, 4, 2, 8, torch.int8)
    return {
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": torch.tensor([0, 5, -1]),
        "k_scales": torch.ones(1),
        "v_scales": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.ones(3, 16)}, r"key is \[3, 16\], expected \[tokens, kv_heads"),
        ({"value": torch.ones(3, 1, 8)}, r"value is \[3, 1, 8\], .* as in key \[3, 2, 8\]"),
        ({"value": torch.ones(2, 2, 8)}, r"value is \[2, 2, 8\]"),
        ({"key": torch.ones(3, 2, 8).double()}, "key is torch.float64"),
        ({"value": torch.ones(3, 2, 8).half()}, "value is torch.float16 beside torch.float32 keys"),
        (
            {"key": torch.ones(3, 8, 2).transpose(1, 2)},
            r"key has strides \[16, 1, 2\], expected 1 for",
        ),
        (
            {"key_cache": torch.ones(2, 4, 2, 9).to(torch.int8)},
            r"key_cache is \[2, 4, 2, 9\], expected \[blocks, block_size, 2, 8\]",
        ),
        ({"value_cache": torch.ones(2, 8, 8).to(torch.int8)}, r"value_cache is \[2, 8, 8\]"),
        (
            {"value_cache": torch.ones(2, 5, 2, 8).to(torch.int8)},
            r"value_cache has blocks \[2, 5\], key_cache \[2, 4\]",
        ),
        (
            {"key_cache": torch.ones(2, 4, 2, 8).to(torch.uint8)},
            "key_cache is torch.uint8 .*view a cache of bytes",
        ),
        (
            {"value_cache": torch.ones(2, 4, 2, 8).to(torch.float8_e5m2)},
            "value_cache is torch.float8_e5m2 beside torch.int8 keys",
        ),
        (
            {"value_cache": torch.ones(2, 4, 8, 2).to(torch.int8).transpose(2, 3)},
            r"value_cache has strides \[64, 16, 1, 2\]",
        ),
        ({"slot_mapping": torch.ones(3)}, r"slot_mapping is torch.float32 \[3\]"),
        ({"slot_mapping": torch.zeros(1, 3).long()}, r"slot_mapping is torch.int64 \[1, 3\]"),
        ({"slot_mapping": torch.arange(4)}, "slot_mapping has 4 slots for 3 keys"),
        ({"k_scales": torch.ones(3)}, r"k_scale is torch.float32 \[3\], .* \[\], \[1\] or \[2\]"),
        ({"v_scales": torch.ones(2).half()}, r"v_scale is torch.float16 \[2\]"),
        ({"key_cache": nhd(2, 4, 2, 8, torch.int8)[0].to("meta")}, "key_cache is on meta, key on"),
        ({"slot_mapping": torch.arange(3, device="meta")}, "slot_mapping is on meta, key on cpu"),
    ],
)
def test_refusals(changed: dict[str, Tensor], message: str) -> None:
    given = operands() | changed
    before = {
        n: bits(t).clone() for n, t in given.items() if "cache" in n and t.device.type != "meta"
    }
    with pytest.raises(ValueError, match=message):
        gpu.scatter(**given, dynamic=False)
    for name, cache in before.items():
        assert torch.equal(bits(given[name]), cache)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 1), (1,)])
def test_refused_scale_caches(shape: tuple[int, ...]) -> None:
    given = operands() | {"k_scales": torch.ones(2, 4, 2), "v_scales": torch.ones(shape)}
    with pytest.raises(ValueError, match=r"v_scale_cache is .* expected float32 \[2, 4, 2\]"):
        gpu.scatter(**given, dynamic=True)


@every_code
@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck(dtype: torch.dtype, dynamic: bool, device: torch.device) -> None:
    with device:
        key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        slots, scale, heads = torch.tensor([0, 5, -1]), torch.ones(()), torch.ones(2)
        caches = [torch.zeros(2, 4, 2, 8).to(dtype) for _ in "kv"]
        scales = [torch.zeros(2, 4, 2) for _ in "kv"]
    # torch's comparison before and after has no floats of 8 bits.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += ["test_schema"] if dtype == torch.int8 else []
    if dynamic:
        operands = (key, value, *caches, *scales, slots)
    else:
        operands = (key, value, *caches, slots, scale, heads)
    op = kv_scatter_dynamic if dynamic else kv_scatter
    torch.library.opcheck(op, operands, test_utils=tests)


def test_under_compile() -> None:
    """The caches that a compiled function was given are the ones written."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(key: Tensor, caches: Tensor, slots: Tensor, scale: Tensor) -> Tensor:
        kv_scatter(key * 2, key, *caches.unbind(1), slots, scale, scale)
        return caches[0, 0].float()

    key, slots, scale = torch.randn(3, 2, 8), torch.tensor([1, 0, -1]), torch.tensor(0.25)
    caches = torch.zeros(2, 2, 4, 2, 8).to(torch.float8_e4m3fn)
    first = compiled(key, caches, slots, scale)
    assert torch.equal(bits(caches[0, 0, 1]), bits(encode(key[0] * 8, torch.float8_e4m3fn)))
    assert torch.equal(bits(caches[0, 1, 0]), bits(encode(key[1] * 4, torch.float8_e4m3fn)))
    assert torch.equal(first, caches[0, 0].float())
