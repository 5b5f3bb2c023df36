"""Which kernel multiplies a linear: the problem, the kernels that could, the choice with reasons.

`Problem` holds every fact the choice depends on, those of the machine included, so that a test
writes down any machine by hand and `choose` is a pure function. A kernel refuses with a sentence,
and the sentences of all that refused travel with the one that was chosen.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
from torch import Tensor

from qplug_converters.errors import QplugError
from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight

from .gpu.compat import VERSION
from .grids import facts

CPU_FEATURES = {
    "avx2": "_is_avx2_supported",
    "avx512": "_is_avx512_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx": "_is_amx_tile_supported",
}
"""What `torch.cpu` is asked; the functions are private and absent from some versions."""

OPTIONAL_OPS = {
    "int4pack": ("aten", "_weight_int4pack_mm_for_cpu", 4),
    "unpack_rows": ("quantized", "embedding_bag_4bit_unpack", 1),
    "wna16": ("_C", "cpu_gemm_wna16", 8),
}
"""Operations that a kernel needs and a build, or a process without vLLM, may not have: namespace,
name, number of arguments (`cpu_gemm_wna16` had nine before vLLM 0.30)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One linear to multiply, and the machine to do it on.

    Attributes
    ----------
    in_features, out_features, bits
        As in `QuantizedWeight`.
    kind
        Of its grid (`grids`).
    group_size
        Neighbouring inputs that share a scale: `in_features` for rows, and the block size for a
        codebook, whose blocks may span rows.
    act_order
        Whether inputs lie in their groups in any other order than k // group_size.
    run
        The largest number such that, with the inputs sorted by group, every aligned block of so
        many inputs lies in one group, in every row. 0 stands for gcd(group_size, in_features),
        what it is without act order.
    highest_zero
        The highest zero (value subtracted); 0 where codes have none.
    whole_zeros
        Whether the offsets of a grid are integer zeros times scales (`grids.integer_zeros`).
    midpoint
        Whether every zero is the middle of the codes, as on symmetric grids.
    table
        The entries of a codebook.
    scale_dtype
        Of the scales, as the file holds them.
    scales_fit_f16
        Whether float16 holds every scale to its own precision.
    offsets_fit_f16
        Whether every zero * scale is below the largest number of float16.
    weights_fit_bf16
        Whether 16 * scale, and so every weight and offset of 4 bits, is below the largest number
        of bfloat16; of another kind than affine, whether every weight is.
    dtype
        Of the activations, and of the result.
    device
        `cpu` or `cuda`.
    arch
        `x86_64`, `aarch64`, ... on a CPU; `sm_90`, ... on CUDA; `gfx942`, ... on ROCm.
    features
        Of the CPU: names out of `CPU_FEATURES`.
    ops
        Names out of `OPTIONAL_OPS` that this process has.
    triton_version
        Major and minor number; (0, 0) where there is no Triton.
    torch_version
        For `doctor` and for refusals that depend on it.
    """

    in_features: int
    out_features: int
    bits: int = 4
    kind: Kind = Kind.AFFINE
    group_size: int = 128
    act_order: bool = False
    run: int = 0
    highest_zero: int = 8
    whole_zeros: bool = False
    midpoint: bool = False
    table: tuple[float, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    scales_fit_f16: bool = True
    offsets_fit_f16: bool = True
    weights_fit_bf16: bool = True
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    arch: str = "x86_64"
    features: frozenset[str] = frozenset()
    ops: frozenset[str] = frozenset()
    triton_version: tuple[int, int] = VERSION
    torch_version: str = torch.__version__

    @property
    def block(self) -> int:
        """How many neighbouring inputs, sorted by group, share scales and zeros."""
        return self.run or gcd(self.group_size, self.in_features)

    @property
    def linears(self) -> str:
        """Return e.g. `4-bit linears` or `4-bit linears (codebook)`."""
        kind = "" if self.kind is Kind.AFFINE else f" ({self.kind.value})"
        return f"{self.bits}-bit linears{kind}"

    @property
    def dtype_name(self) -> str:
        """Return e.g. `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def machine(self) -> str:
        """Return e.g. `x86_64 with avx2, avx512`."""
        return f"{self.arch} with {', '.join(sorted(self.features)) or 'none of them'}"

    @staticmethod
    def here(
        weight: QuantizedWeight, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Problem:
        """Describe `weight` on this machine and in this process."""
        device = torch.device(device)
        return Problem(
            **facts(weight),
            dtype=dtype,
            device=device.type,
            arch=_arch(device),
            features=_cpu_features(),
            ops=frozenset(name for name in OPTIONAL_OPS if _has(*OPTIONAL_OPS[name])),
        )


def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.machine().replace("AMD64", "x86_64")
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _cpu_features() -> frozenset[str]:
    asked = {name: getattr(torch.cpu, ask, None) for name, ask in CPU_FEATURES.items()}
    found = frozenset(name for name, ask in asked.items() if ask is not None and ask())
    # Linux lets a process use AMX only after it has asked. oneDNN asks at its first bfloat16
    # matmul; an operation that runs before that (vLLM's, which does not) dies of SIGILL.
    if "amx" in found and not torch.cpu._init_amx():
        return found - {"amx"}
    return found


def _has(namespace: str, op: str, arguments: int) -> bool:
    found = getattr(getattr(torch.ops, namespace), op, None)
    return found is not None and len(found.default._schema.arguments) == arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to multiply by a quantized weight.

    Attributes
    ----------
    name
        What `QPLUG_KERNEL` and the log call it; unique.
    title
        What it does, in half a sentence.
    dense
        Whether the weight is held unpacked, which is never silent: the one operand is then
        `[out, in]` in the dtype of the activations.
    device
        The one kind of device that it runs on, as in `Problem.device`; empty: any.
    cannot
        Returns why this kernel cannot serve a problem, as a sentence, or `None`.
    prepare
        Encodes a weight into the tensors of the kernel by name; their order is that of the
        operands of `run`.
    run
        `run(x [M, in], operands, bias or None) -> [M, out]`, M > 0.
    dequantize
        `dequantize(operands) -> [out, in]` in the dtype of the activations and in the inputs'
        own order: what the gradient goes through.
    """

    name: str
    title: str
    cannot: Callable[[Problem], str | None]
    prepare: Callable[[QuantizedWeight, Problem], dict[str, Tensor]]
    run: Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]
    dequantize: Callable[[Sequence[Tensor]], Tensor]
    dense: bool = False
    device: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel for a problem, and why those preferred to it on the same device cannot."""

    kernel: Kernel
    rejected: tuple[tuple[Kernel, str], ...] = ()

    @property
    def reasons(self) -> str:
        """The refusals as one line."""
        return "; ".join(f"{kernel.name}: {reason}" for kernel, reason in self.rejected)


def choose(
    problem: Problem, kernels: Sequence[Kernel] | None = None, force: str | None = None
) -> Choice:
    """Return the first kernel that can, with the reasons of those before it.

    Parameters
    ----------
    problem
        The linear and the machine.
    kernels
        In order of preference; `qplug_kernels.KERNELS` by default.
    force
        Take the kernel of this name (`QPLUG_KERNEL`).

    Raises
    ------
    QplugError
        If the kernel asked for by name is unknown or cannot, or if no kernel can.
    """
    if kernels is None:
        from . import KERNELS

        kernels = KERNELS
    if force is not None:
        return Choice(_forced(problem, kernels, force))
    rejected: list[tuple[Kernel, str]] = []
    for kernel in kernels:
        if kernel.device not in ("", problem.device):
            continue  # goes without saying
        reason = kernel.cannot(problem)
        if reason is None:
            return Choice(kernel, tuple(rejected))
        rejected.append((kernel, reason))
    reasons = "; ".join(f"{kernel.name}: {reason}" for kernel, reason in rejected)
    raise QplugError(f"no kernel for this linear ({reasons})")


def _forced(problem: Problem, kernels: Sequence[Kernel], name: str) -> Kernel:
    names = ", ".join(kernel.name for kernel in kernels)
    for kernel in kernels:
        if kernel.name == name:
            reason = kernel.cannot(problem)
            if reason is None:
                return kernel
            raise QplugError(
                f"a linear that kernel `{name}` cannot multiply: {reason}",
                "QPLUG_KERNEL",
                "",
                "unset QPLUG_KERNEL to let qplug choose",
            )
    raise QplugError(f"`{name}`", "QPLUG_KERNEL", f"one of {names}")
