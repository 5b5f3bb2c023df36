"""Tables of 16 entries as PRMT reads them: the search, the constants, the instructions."""

from __future__ import annotations

import struct

import numpy as np
import ptx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qplug_converters.formats.bnb_4bit import TABLES
from qplug_kernels.gpu.lookup import Lookup, lookup

NF4, FP4 = (struct.unpack("<16f", TABLES[name]) for name in ("nf4", "fp4"))
ALL_POSITIVE = tuple(0.37 * (i + 1) for i in range(16))
SEVEN_BELOW = tuple(float(i) - 6.5 for i in range(16))
"""Seven entries below zero, none at it: PRMT cannot tell their signs apart, the turned form can."""

ENTRIES = st.floats(-100, 100, allow_nan=False, allow_subnormal=False)
DTYPES = (torch.float16, torch.bfloat16)
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Half an ulp of the dtype."""


def values_of(patterns: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int32).to(torch.int16).view(dtype).double()


def error_of(found: Lookup, table: tuple[float, ...], dtype: torch.dtype) -> float:
    """The largest error, out of the patterns alone."""
    entries = torch.tensor(table, dtype=torch.float64)
    got = values_of(found.patterns, dtype)[list(found.codes)] / found.scale
    least = entries.abs().max() * 2.0**-8
    return float(((got - entries).abs() / torch.maximum(entries.abs(), least)).nan_to_num().max())


def execute(found: Lookup, words: np.ndarray) -> np.ndarray:
    """The 16-bit patterns `[..., plane, lane]` that the assembly gives for words of 8 nibbles."""
    planes = ptx.run(found.asm, [words], 4)
    return np.stack([np.stack([p & 0xFFFF, p >> 16], -1) for p in planes], -2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("table", "turn"), [(NF4, 0), (FP4, 0), (ALL_POSITIVE, 0), (SEVEN_BELOW, 1)]
)
def test_the_assembly_reads_the_table(
    table: tuple[float, ...], turn: int, dtype: torch.dtype
) -> None:
    found = lookup(table, dtype)
    assert found.turn == turn
    words = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    nibbles = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    wanted = np.array(found.patterns, np.uint32)[nibbles].reshape(-1, 4, 2)
    np.testing.assert_array_equal(execute(found, words), wanted)


@settings(deadline=None, max_examples=60)
@given(table=st.tuples(*[ENTRIES] * 16), dtype=st.sampled_from(DTYPES))
def test_any_table_can_be_read(table: tuple[float, ...], dtype: torch.dtype) -> None:
    found = lookup(table, dtype)
    assert sorted(found.order) == list(range(16))
    words = np.array([0x76543210, 0xFEDCBA98], np.uint32)
    np.testing.assert_array_equal(execute(found, words).flatten(), found.patterns)
    assert error_of(found, table, dtype) <= 1.05 * found.error + 1e-12
    assert found.error < 4 * BOUND[dtype]


@pytest.mark.parametrize(
    ("table", "dtype", "error"),
    [
        (NF4, torch.float16, 2.1e-4),
        (NF4, torch.bfloat16, 1.9e-3),
        (FP4, torch.float16, 4e-8),
        (FP4, torch.bfloat16, 2.0e-3),
        (tuple(float(i - 8) for i in range(16)), torch.bfloat16, 0.0),
    ],
)
def test_the_tables_in_use_lose_next_to_nothing(
    table: tuple[float, ...], dtype: torch.dtype, error: float
) -> None:
    found = lookup(table, dtype)
    assert error_of(found, table, dtype) <= error
    assert found.error <= error


def test_a_zero_stays_one() -> None:
    for table in (NF4, FP4, (*SEVEN_BELOW[:15], 0.0), (0.0,) * 16):
        for dtype in DTYPES:
            found = lookup(table, dtype)
            zeros = [code for code, entry in enumerate(table) if entry == 0]
            assert all(found.patterns[found.codes[code]] & 0x7FFF == 0 for code in zeros)


def test_entries_far_apart_keep_their_share_of_the_largest() -> None:
    table = tuple(10.0**-i for i in range(16))
    assert lookup(table, torch.float16).error < 1e-3


@pytest.mark.parametrize("table", [NF4[:15], (*NF4[:15], float("nan")), (*NF4[:15], float("inf"))])
def test_what_is_no_table_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 16 finite ones"):
        lookup(table, torch.float16)


def test_quads_hold_the_patterns() -> None:
    found = lookup(NF4, torch.bfloat16)
    read = [found.quads[n >> 2] >> 16 * (n & 3) & 0xFFFF for n in range(16)]
    assert tuple(read) == found.patterns
