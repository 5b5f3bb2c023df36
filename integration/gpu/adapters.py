"""One face for everything that is timed: a weight arranged once, multiplied many times.

An adapter gets a weight in qplug's canonical form and arranges it as its library wants it, by the
library's own functions where there are any. What it arranged wrongly is found by comparing with
float64 and never timed; what is not installed says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from qplug_converters.codec import dequantize_to
from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight
from qplug_kernels import apply_linear, prepare

from .cases import Form

OURS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
THEIRS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative Frobenius errors. Other libraries round weights to 16 bits, or offsets of them;
a layout that is wrong gives an error near 1."""


class Side(StrEnum):
    """What a time is compared as."""

    QPLUG = "qplug"
    TRITON = "triton"
    CUDA = "cuda"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Ready:
    """A weight arranged for a library.

    Attributes
    ----------
    tensors
        All that a call reads but activations; copies of them take turns.
    call
        `call(x [M, in], tensors) -> [M, out]`.
    detail
        Which of several ways it is.
    """

    tensors: Sequence[Tensor]
    call: Callable[[Tensor, Sequence[Tensor]], Tensor]
    detail: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A way to multiply.

    Attributes
    ----------
    name
        In tables and options.
    side
        What its times are compared as.
    cannot
        Returns why it has no such form, or `None`.
    prepare
        Arranges a weight; raises what it likes where the library is absent or refuses.
    """

    name: str
    side: Side
    cannot: Callable[[Form], str | None]
    prepare: Callable[[QuantizedWeight, Form], Ready]

    def bound(self, form: Form) -> float:
        """Return the largest relative error that passes."""
        return (OURS if self.side is Side.QPLUG else THEIRS)[form.dtype]


def any_form(form: Form) -> None:
    """Take every form."""


def prepare_qplug(weight: QuantizedWeight, form: Form) -> Ready:
    """Let qplug choose its kernel."""
    prepared = prepare(weight, form.dtype, weight.codes.device)
    names = tuple(prepared.tensors)

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return apply_linear(x, replace(prepared, tensors=dict(zip(names, tensors, strict=True))))

    return Ready(tuple(prepared.tensors.values()), call, prepared.kernel)


def prepare_dense(weight: QuantizedWeight, form: Form) -> Ready:
    """Multiply by the dense weight."""
    return Ready((dequantize_to(weight, form.dtype),), lambda x, tensors: F.linear(x, tensors[0]))


def cannot_tinygemm(form: Form) -> str | None:
    """Say why torch's own 4-bit operation has no such form."""
    if form.kind is not Kind.AFFINE or form.bits != 4:
        return "it holds 4-bit integers"
    if form.act_order:
        return "it knows no act order"
    return None if form.dtype is torch.bfloat16 else "it multiplies bfloat16 alone"


def prepare_tinygemm(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange a weight for `_weight_int4pack_mm`: w = (code - 8) * s + (8 - zero) * s."""
    pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = weight.affine.scales.float()
    offsets = (8 - weight.affine.zeros) * scales
    scale_offset = torch.stack((scales, offsets), -1).transpose(0, 1).to(form.dtype).contiguous()

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, tensors[0], form.group_size, tensors[1])

    return Ready((packed, scale_offset), call)


QPLUG = Adapter("qplug", Side.QPLUG, any_form, prepare_qplug)
DENSE = Adapter("cublas", Side.DENSE, any_form, prepare_dense)
TINYGEMM = Adapter("tinygemm", Side.CUDA, cannot_tinygemm, prepare_tinygemm)
