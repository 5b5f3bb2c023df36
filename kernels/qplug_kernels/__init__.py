"""How a quantized linear is multiplied: no files, no engines.

`prepare` chooses one of `KERNELS` and encodes a `QuantizedWeight` into its layout; `apply_linear`
runs it, unless an engine takes a plain dense weight for itself. `prepare_experts` and
`apply_experts` do so for a mixture of experts. A kernel is one file and one line here; its place is
its preference.
"""

from . import cpu_int4, cpu_int4_wna16, dense, reference
from .experts import PreparedExperts, apply_experts, prepare_experts
from .gpu import affine, codebook, cuda_cores, rows
from .linear import Prepared, apply_linear, prepare
from .problem import Choice, Kernel, Problem, choose
from .warm import warm_up

KERNELS: tuple[Kernel, ...] = (
    cpu_int4_wna16.KERNEL,
    cpu_int4.KERNEL,
    affine.KERNEL,
    cuda_cores.KERNEL,
    codebook.KERNEL,
    rows.KERNEL,
    dense.KERNEL,
    reference.KERNEL,
)

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Prepared",
    "PreparedExperts",
    "Problem",
    "apply_experts",
    "apply_linear",
    "choose",
    "prepare",
    "prepare_experts",
    "warm_up",
]
