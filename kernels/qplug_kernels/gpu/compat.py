"""What differs between versions of Triton, and whether there is one.

Kernels are declared when their files are imported, and those are imported where Triton is absent
too: `jit` then returns the function as it is, which no one calls, since `cannot` refuses. Nothing
here, and no declaration, asks a driver for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _version() -> tuple[int, int]:
    if triton is None:
        return 0, 0
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


VERSION = _version()
"""Major and minor number of Triton; (0, 0) where it is not installed."""

OLDEST = (3, 5)
"""3.4 has no products of 8 columns, 3.2 and 3.3 no tuples out of inline assembly."""


def jit(function: Callable[..., Any]) -> Any:
    """Declare a function of the device."""
    return function if triton is None else triton.jit(function)


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel that is not compiled anew for special values of these arguments.

    A number of tokens would otherwise cost three compilations: 1, multiples of 16, others.
    """

    def declare(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=names)

    return declare


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (`TRITON_INTERPRET=1` at import)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, which Triton launches on, for as long as needed."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def joins(arch: str, tokens: int, version: tuple[int, int] = VERSION) -> bool:
    """Whether planes are joined before the product: which of two sources compiles well.

    Joined planes cost mma.sync its ldmatrix of the activations up to Triton 3.7; planes one by one
    wait for each wgmma of sm_90 and product of sm_100 (where of 64 tokens both are stored to shared
    memory), and Triton 3.8 sends every second output of inline assembly through shared memory.
    Instructions per weight of either: docs/adr/0010.
    """
    wide = (arch.startswith("sm_90") and tokens >= 16) or (
        arch.startswith("sm_10") and 16 <= tokens <= 32
    )
    return version >= (3, 8) or wide
