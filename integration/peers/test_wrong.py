"""Where a tool reads a checkpoint wrongly, or not at all, and qplug reads it right.

Each case is why that reader is no oracle there. One that passes no longer says that the tool was
repaired: then its case goes to `test_read.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from .cases import assert_same, different, label, pairs, reference
from .peers import Unusable

pytestmark = pytest.mark.peer

Dense = Callable[[Path], dict[str, Tensor]]
Read = Callable[..., dict[str, Tensor]]

MISREAD = {
    # 3-bit zeros as GPTQModel <= 6.0.3 stored them: 7.7 takes them for its own.
    ("gptqmodel", "read"): ("gptq-3b-sym-g128-by-5.8.0",),
    # Its dequantizer of files knows neither AutoAWQ's order of columns ...
    ("gptqmodel", "dequantize_file"): (
        "awq-gemm-g128",
        "awq-gemm-g32-bias",
        # ... nor the borrow of a zero point of 0, which its own layers undo.
        "gptq-4b-asym-g64",
        "gptq-2b-asym-g32",
    ),
}
"""By tool and function: silently other weights."""
REFUSED = {
    # AutoGPTQ wrote `is_marlin_format: false` into every checkpoint.
    ("gptqmodel", "read", "is_marlin_format"): ("autogptq-3b-sym-g64", "autogptq-4b-asym-g128"),
    # `dynamic`: modules of other bits than the rest.
    ("gptqmodel", "dequantize_file", "must match the size"): ("gptq-dynamic-mixed",),
}
"""By tool, function and what the error says."""


@pytest.mark.parametrize(("how", "source"), pairs(MISREAD), ids=label)
def test_misread(how: tuple[str, str], source: str, read: Read, dense: Dense, golden: Path) -> None:
    name, function = how
    expected = reference(golden / source)
    assert different(read(name, golden / source, function), expected)
    ours = dense(golden / source)
    assert_same({name: ours[name] for name in expected}, expected)


@pytest.mark.parametrize(("how", "source"), pairs(REFUSED), ids=label)
def test_refused(
    how: tuple[str, str, str], source: str, read: Read, dense: Dense, golden: Path
) -> None:
    name, function, why = how
    with pytest.raises(Unusable, match=why):
        read(name, golden / source, function)
    expected = reference(golden / source)
    ours = dense(golden / source)
    assert_same({name: ours[name] for name in expected}, expected)
