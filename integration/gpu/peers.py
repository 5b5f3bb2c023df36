"""Other libraries' multiplications by quantized weights, each called as its own engine calls it.

    name          version      side    read in
    gemlite       0.6.0.post2  Triton  gemlite/core.py
    conch         1.3          Triton  vLLM's kernels/linear/mixed_precision/conch.py
    bitsandbytes  0.50.2       CUDA    bitsandbytes/autograd/_functions.py, _ops.py
    humming       0.1.19       CUDA    humming/layer.py, schema/humming.py, forward.py
    marlin        vLLM 0.20.0  CUDA    vLLM's .../mixed_precision/marlin.py, marlin_utils.py
    machete       vLLM 0.20.0  CUDA    vLLM's .../mixed_precision/machete.py

None is a dependency: one that is not importable is reported as absent. `bring_peers.py` packs them
for a machine without a network. Nothing here is copied from them; arrangements are written down as
the permutations of axes that they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight

from .adapters import DENSE, QPLUG, TINYGEMM, Adapter, Ready, Side
from .cases import Form


def bits_along_inputs(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[out, in]` into int32 `[in * bits / 32, out]`, the lowest bits first (GPTQ)."""
    each = 32 // bits
    fields = codes.T.reshape(-1, each, codes.shape[0]).to(torch.int32)
    words = torch.zeros_like(fields[:, 0])
    for at in range(each):
        words |= fields[:, at] << bits * at
    return words


def _integers(form: Form, bits: Sequence[int], *, act_order: bool = False) -> str | None:
    """Say why a library of integers alone has no such form."""
    if form.kind is not Kind.AFFINE:
        return "it holds integers"
    if form.bits not in bits:
        return f"it has no {form.bits} bits"
    return "it knows no act order" if form.act_order and not act_order else None


# --- GemLite -------------------------------------------------------------------------------------


@cache
def _gemlite():
    import gemlite

    # Its own files of tuned configurations have no H200; the H100 is the same processor. Without
    # one it would try hundreds of configurations at its first call of each shape.
    path = Path(gemlite.__file__).parent / "configs" / "h100.json"
    if torch.cuda.get_device_capability() == (9, 0) and path.exists():
        gemlite.load_config(str(path))
    else:
        gemlite.set_autotune("default")
    return gemlite


def prepare_gemlite(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange by `GemLiteLinear.pack`; call what its `forward` calls."""
    gemlite = _gemlite()
    kind = gemlite.DType.FP16 if form.dtype is torch.float16 else gemlite.DType.BF16
    layer = gemlite.GemLiteLinear(
        form.bits, form.group_size, weight.in_features, weight.out_features, kind, kind
    )
    grid = weight.affine
    zeros = 1 << (form.bits - 1) if form.symmetric else grid.zeros.to(form.dtype)
    layer.pack(weight.codes, grid.scales.to(form.dtype), zeros)
    meta = layer.get_meta_args()

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return gemlite.forward_functional(x, None, list(tensors), meta)

    return Ready(tuple(tensor.data for tensor in layer.get_tensor_args()), call)


# --- conch ---------------------------------------------------------------------------------------


def prepare_conch(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange as vLLM does: GPTQ's words; zeros as bytes `[groups, out]`, or a bias."""
    from conch.ops.quantization.gemm import mixed_precision_gemm

    grid = weight.affine
    tensors = [bits_along_inputs(weight.codes, form.bits), grid.scales.T.contiguous()]
    if not form.symmetric:
        tensors.append(grid.zeros.T.to(torch.uint8).contiguous())

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return mixed_precision_gemm(
            x=x,
            w_q_packed=tensors[0],
            w_s=tensors[1],
            w_zp=None if form.symmetric else tensors[2],
            weight_size_bits=form.bits,
            weight_bias=1 << (form.bits - 1) if form.symmetric else 0,
            group_size=form.group_size,
        )

    return Ready(tuple(tensors), call)


# --- bitsandbytes --------------------------------------------------------------------------------


def cannot_bitsandbytes(form: Form) -> str | None:
    """Say why `gemm_4bit` has no such form; its int8 rounds activations too."""
    return None if form.kind is Kind.CODEBOOK else "it holds NF4 and FP4"


def prepare_bitsandbytes(weight: QuantizedWeight, form: Form) -> Ready:
    """Two codes a byte, the first in the high half; which kernel runs is bitsandbytes' choice."""
    import bitsandbytes  # noqa: F401 - registers its operations

    pairs = weight.codes.view(-1, 2)
    packed = (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous()
    shape = list(weight.codes.shape)

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x, tensors[0], shape, tensors[1], form.group_size, "nf4"
        )

    return Ready((packed, weight.grid.absmax), call)


# --- Humming -------------------------------------------------------------------------------------


def prepare_humming(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange by `HummingLayer.transform`; call what its `forward` calls."""
    from humming import ops
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    scheme = {
        "dtype": f"uint{form.bits}",
        "group_size": form.group_size,
        "has_zero_point": not form.symmetric,
    }
    layer = HummingLayer(
        weight.out_features, weight.in_features, scheme, torch_dtype=form.dtype
    ).cuda()
    grid = weight.affine
    stored = {
        "weight": ops.pack_weight(weight.codes.int(), form.bits),
        "weight_scale": grid.scales.to(form.dtype),
    }
    if not form.symmetric:
        zeros = grid.zeros.T.int().contiguous()
        stored["zero_point"] = ops.pack_weight(zeros, form.bits).T.contiguous()
    layer.load_from_tensors(stored)
    layer.transform()
    names = [
        name
        for name in ("weight", "weight_scale", "zero_point", "locks")
        if getattr(layer, name, None) is not None
    ]
    config = layer.humming_config

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return humming_forward(config, inputs=x, **dict(zip(names, tensors, strict=True)))

    return Ready(tuple(getattr(layer, name).data for name in names), call)


# --- Marlin and Machete, out of vLLM's extension -------------------------------------------------

UINT4, UINT4_8, UINT8_128 = (
    (bits << 8) + (bias << 17) + (1 << 50) for bits, bias in ((4, 0), (4, 8), (8, 128))
)
"""vLLM's `ScalarType.id`: bits of the integer, what is subtracted, IEEE's NaN."""


@cache
def vllm_ops():
    """Load vLLM's operations.

    Raises
    ------
    ImportError
        If neither vLLM nor its library (`QPLUG_VLLM_LIBRARY`) is here.
    """
    library = os.environ.get("QPLUG_VLLM_LIBRARY")
    if library:
        torch.ops.load_library(library)
    else:
        import vllm._C  # noqa: F401
    return torch.ops._C


def _vllm_type(form: Form) -> int:
    if not form.symmetric:
        return UINT4
    return UINT4_8 if form.bits == 4 else UINT8_128


def cannot_vllm(form: Form) -> str | None:
    """Say why Marlin and Machete have no such form."""
    if form.bits == 8 and not form.symmetric:
        return "its 8 bits are symmetric"
    return _integers(form, (4, 8), act_order=True)


def marlin_columns(values: Tensor) -> Tensor:
    """Put the columns of `[groups, out]` into the order in which Marlin's threads read them."""
    eight_by_eight = values.unflatten(1, (-1, 8, 8))
    return eight_by_eight.transpose(2, 3).flatten(1).contiguous()


def marlin_zeros(zeros: Tensor) -> Tensor:
    """Pack 4-bit zeros `[groups, out]`, columns as Marlin reads them, evens before odds."""
    eights = marlin_columns(zeros).unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(2)
    words = torch.zeros_like(eights[..., 0], dtype=torch.int32)
    for at in range(8):
        words |= eights[..., at].to(torch.int32) << 4 * at
    return words


def prepare_marlin(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange GPTQ's words by `gptq_marlin_repack`; scales and zeros by the two functions above."""
    ops, grid = vllm_ops(), weight.affine
    device, (rows, columns) = weight.codes.device, weight.codes.shape
    empty = torch.empty(0, dtype=torch.int32, device=device)
    groups, order = empty, empty
    if form.act_order:
        order = torch.argsort(grid.g_idx, stable=True).to(torch.int32)
        groups = grid.g_idx[order.long()].contiguous()
    words = bits_along_inputs(weight.codes, form.bits)
    words = ops.gptq_marlin_repack(words, order, columns, rows, form.bits, False)
    scales = marlin_columns(grid.scales.T)
    zeros = empty if form.symmetric else marlin_zeros(grid.zeros.T)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    locks = torch.zeros(processors, dtype=torch.int32, device=device)
    kind = _vllm_type(form)

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        words, scales, zeros, groups, order, locks = tensors
        return ops.marlin_gemm(
            x, None, words, None, scales, None, None, zeros, groups, order, locks, kind,
            x.shape[0], rows, columns, True, False, True, False,
        )  # fmt: skip

    return Ready((words, scales, zeros, groups, order, locks), call)


def prepare_machete(weight: QuantizedWeight, form: Form) -> Ready:
    """Arrange by `machete_prepack_B`; zeros are offsets, and torch sorts the inputs.

    vLLM sorts them by its `permute_cols`, which is in another of its libraries.
    """
    ops, grid = vllm_ops(), weight.affine
    kind, codes = _vllm_type(form), weight.codes
    tensors = []
    if form.act_order:
        order = torch.argsort(grid.g_idx, stable=True)
        codes = codes.index_select(1, order)
        tensors.append(order)
    words = bits_along_inputs(codes, form.bits).T.contiguous().T
    scales = grid.scales.T.contiguous()
    tensors += [ops.machete_prepack_B(words, form.dtype, kind, form.dtype), scales]
    if not form.symmetric:
        tensors.append((-scales * grid.zeros.T.to(form.dtype)).contiguous())

    def call(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        if form.act_order:
            x, tensors = x.index_select(1, tensors[0]), tensors[1:]
        zeros = None if form.symmetric else tensors[2]
        return ops.machete_mm(
            x, tensors[0], kind, None, tensors[1], zeros, form.group_size, None, None, None
        )

    return Ready(tuple(tensors), call)


ADAPTERS = (
    QPLUG,
    DENSE,
    TINYGEMM,
    Adapter("gemlite", Side.TRITON, lambda form: _integers(form, (2, 4, 8)), prepare_gemlite),
    Adapter("conch", Side.TRITON, lambda form: _integers(form, (4, 8)), prepare_conch),
    Adapter("bitsandbytes", Side.CUDA, cannot_bitsandbytes, prepare_bitsandbytes),
    Adapter("humming", Side.CUDA, lambda form: _integers(form, (2, 3, 4, 8)), prepare_humming),
    Adapter("marlin", Side.CUDA, cannot_vllm, prepare_marlin),
    Adapter("machete", Side.CUDA, cannot_vllm, prepare_machete),
)
"""All, qplug first: when time runs out, its times are there."""
