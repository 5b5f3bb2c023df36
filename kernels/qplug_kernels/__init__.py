"""How a quantized linear is multiplied: no files, no engines.

`prepare` chooses one of `KERNELS` and encodes a `QuantizedWeight` into its layout; `apply_linear`
runs it. A kernel is one file and one line here; its place is its preference.
"""

from . import dense, reference
from .linear import Prepared, apply_linear, prepare
from .problem import Choice, Kernel, Problem, choose

KERNELS: tuple[Kernel, ...] = (
    dense.KERNEL,
    reference.KERNEL,
)

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Prepared",
    "Problem",
    "apply_linear",
    "choose",
    "prepare",
]
