"""4-bit weights at bfloat16 on a CPU: torch's int4 pack for few tokens, rows decoded for many.

    tensor      shape                 dtype     meaning
    pack        [N, K/2]              uint8     codes in torch's own order (depends on the CPU)
    scale_zero  [K/g, N, 2]           bfloat16  s and (8 - zero) * s; g is 32, 64, 128 or 256
    rows        [N, K/b, b/2 + 4]     uint8     b codes, two a byte, low nibble first, then scale
                                                and -zero * scale as float16: the rows of torch's
                                                4-bit embeddings
    order       [K], absent when      int32     the input at each sorted place (act order)
                inputs are in order
    x           [M, K]                bfloat16
    result      [M, N]                bfloat16  x @ w.T + bias

w = (code - 8) * s + (8 - zero) * s out of `pack`, w = code * s - zero * s out of `rows`; both are
(code - zero) * scale. An offset of the file takes the place of -zero * scale, exactly.
1 + 4/g + 4/b bytes per weight: 1.25 for groups of 32, 1.06 for 128.

`_weight_int4pack_mm_for_cpu` never uses the matrix unit, so its time is proportional to M; decoding
`rows` costs the same for every M, then multiplies as the dense layer does. One Xeon core with
AMX-bf16, torch 2.13, microseconds, dense bf16 | pack | rows:

    M          1                    16                   64                   256
    576x1536   122 | 46 | 563       133 | 318 | 569      226 | 1309 | 629     482 | 5256 | 907
    4096x4096  2415 | 791 | 10837   2385 | 5856 | 10622  4284 | 23739 | 11063 10008 | 93025 | 17336

Rows rather than other ways to decode: `embedding_bag_4bit_unpack` is FBGEMM's vectorised loop, 8 to
10 thousand million weights a second, 2.7 with the rounding to bfloat16 into memory; a table of
pairs of codes with a subtraction and a product reaches 1.5.

Rounding: `pack` holds scales and offsets in bfloat16 (relative error 2^-9 each), `rows` in
float16, exact for float16 files. Relative Frobenius error of a product against float64: 2e-3 each,
1e-2 promised. A few tokens and many thus differ in their last bits, as they do in dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug_converters.scheme import Kind
from qplug_converters.weight import OffsetGrid, QuantizedWeight

from .problem import Kernel, Problem

NATIVE = (256, 128, 64, 32)
"""Group sizes of torch's operation."""

FEW = 24
"""Most tokens for `pack`: its time crosses that of `rows` between 23 and 28 in all shapes."""

PIECE = 1 << 17
"""Weights decoded at a time: 512 KiB of float32, a quarter of the second-level cache. 64 Ki lose
8 % to overhead, 256 Ki 25 % and 512 Ki 35 % to cache misses."""

SCRATCH = 1 << 22
"""Weights multiplied at a time: 8 MiB of bfloat16. At 4096x4096 and 256 tokens: 256 Ki weights
20 ms (oneDNN arranges small operands anew), 1 Mi 15.5, 4 Mi 14, 16 Mi 27 (fresh pages)."""


def native_group(problem: Problem) -> int | None:
    """Return the largest group of torch's operation that cuts no group of the problem."""
    return next((size for size in NATIVE if problem.block % size == 0), None)


def cannot_pack(problem: Problem) -> str | None:
    """Say why torch's int4 pack operation cannot multiply few tokens, or is not the fastest."""
    if problem.device != "cpu":
        return "it runs on a CPU"
    if problem.kind not in (Kind.AFFINE, Kind.OFFSET):
        return f"the grid is of the kind `{problem.kind.value}`, and the operation needs `affine`"
    if problem.dtype != torch.bfloat16:
        # 41 ms instead of 0.8 (and 2.5 dense) for one token at 4096x4096 in float16.
        return (
            f"activations are {problem.dtype_name}, and torch's 4-bit operation is vectorised "
            "for bfloat16 only"
        )
    if problem.bits > 4:
        return f"codes have {problem.bits} bits, and the operation holds 4"
    if problem.highest_zero > 16:
        return f"a zero is {problem.highest_zero}, above 16"
    if not problem.weights_fit_bf16:
        return "scales are so large that 16 of one may overflow bfloat16"
    if problem.arch != "x86_64" or "avx2" not in problem.features:
        return f"the operation is vectorised for x86-64 with AVX2, and this is {problem.machine}"
    if "int4pack" not in problem.ops:
        return f"torch {problem.torch_version} has no int4 pack operation for a CPU"
    if problem.out_features % 16:
        return f"{problem.out_features} outputs are no multiple of 16"
    if native_group(problem) is None:
        order = " in act order" if problem.act_order else ""
        return (
            f"groups of {problem.group_size} over {problem.in_features} inputs{order} do not "
            "split into blocks of 32"
        )
    return None


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    reason = cannot_pack(problem)
    if reason is None and "unpack_rows" not in problem.ops:
        reason = f"torch {problem.torch_version} has no 4-bit embedding rows (FBGEMM)"
    if reason is None and not problem.scales_fit_f16:
        reason = "scales are outside the range of float16"
    if reason is None and not problem.offsets_fit_f16:
        reason = "an offset (a zero times its scale) overflows float16"
    return reason


def sort_inputs(weight: QuantizedWeight, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return the codes with inputs sorted by group, and the input at each place (or `None`)."""
    if not problem.act_order:
        return weight.codes, None
    groups = weight.affine.group_of_inputs(weight.in_features)
    order = torch.argsort(groups, stable=True)
    return weight.codes.index_select(1, order), order.to(torch.int32)


def spread_blocks(weight: QuantizedWeight, block: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, float32 `[out, in / block]`, for each block of sorted inputs."""
    groups = weight.affine.group_of_inputs(weight.in_features).sort().values[::block]
    return weight.affine.scales[:, groups].float(), weight.affine.zeros[:, groups].float()


def lines(weight: QuantizedWeight, block: int, code: int) -> tuple[Tensor, Tensor]:
    """Return scales and the weight of `code`, float32 `[out, in / block]`, for each block."""
    if isinstance(weight.grid, OffsetGrid):
        groups = torch.arange(0, weight.in_features, block) // weight.grid.group_size
        scales = weight.grid.scales[:, groups].float()
        return scales, code * scales + weight.grid.offsets[:, groups].float()
    scales, zeros = spread_blocks(weight, block)
    return scales, (code - zeros) * scales


def pack(weight: QuantizedWeight, problem: Problem, codes: Tensor) -> dict[str, Tensor]:
    """Return `pack` and `scale_zero`: what few tokens are multiplied by."""
    group = native_group(problem)
    assert group is not None
    scale_zero = torch.stack(lines(weight, group, 8), -1).transpose(0, 1)
    # The last argument is a tile size that only CUDA's layout looks at.
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    return {"pack": packed, "scale_zero": scale_zero.to(torch.bfloat16).contiguous()}


def multiply_pack(x: Tensor, packed: Tensor, scale_zero: Tensor) -> Tensor:
    """Multiply few tokens `x [M, K]`."""
    group = x.shape[1] // scale_zero.shape[0]
    result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), packed, group, scale_zero
    )
    return result


def pack_rows(weight: QuantizedWeight, problem: Problem, codes: Tensor) -> Tensor:
    """Return `rows`: what many tokens are multiplied by."""
    block = problem.block
    scale_offset = torch.stack(lines(weight, block, 0), -1).half().view(torch.uint8)
    nibbles = (codes[:, ::2] | (codes[:, 1::2] << 4)).view(len(codes), -1, block // 2)
    return torch.cat((nibbles, scale_offset), -1)


def unpack_rows(rows: Tensor, out: Tensor) -> Tensor:
    """Decode `rows [n, blocks, bytes]` into `out [n, K]`, a piece at a time."""
    width, nbytes = out.shape[1], rows.shape[2]
    step = max(1, PIECE // width)
    for start in range(0, rows.shape[0], step):
        piece = rows[start : start + step]
        weights = torch.ops.quantized.embedding_bag_4bit_unpack(piece.view(-1, nbytes))
        out[start : start + step] = weights.view(-1, width)
    return out


def multiply_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Multiply many tokens `x [M, K]`: decode a few megabytes of rows, multiply, go on."""
    out_features, in_features = rows.shape[0], x.shape[1]
    result = x.new_empty(x.shape[0], out_features)
    step = min(out_features, max(16, SCRATCH // in_features))
    scratch = x.new_empty(step, in_features)
    for start in range(0, out_features, step):
        part = rows[start : start + step]
        weight = unpack_rows(part, scratch[: part.shape[0]])
        torch.mm(x, weight.T, out=result[:, start : start + step])
    return result


def unsort(weight: Tensor, order: Tensor | None) -> Tensor:
    """Put the columns of a decoded weight back into the inputs' own order."""
    if order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, order.long(), weight)


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table."""
    codes, order = sort_inputs(weight, problem)
    tensors = pack(weight, problem, codes)
    tensors["rows"] = pack_rows(weight, problem, codes)
    return tensors if order is None else {**tensors, "order": order}


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    if len(operands) == 4:
        x = x.index_select(1, operands[3])
    if x.shape[0] <= FEW:
        result = multiply_pack(x, operands[0], operands[1])
    else:
        result = multiply_rows(x, operands[2])
    return result if bias is None else result.add_(bias)


def dequantize(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight out of `rows`, the more precise copy."""
    rows = operands[2]
    block = 2 * (rows.shape[2] - 4)
    weight = torch.empty(rows.shape[0], rows.shape[1] * block, dtype=torch.bfloat16)
    return unsort(unpack_rows(rows, weight), operands[3] if len(operands) == 4 else None)


KERNEL = Kernel(
    name="cpu_int4",
    title=f"torch's int4 pack up to {FEW} tokens, above that rows decoded piece by piece",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=dequantize,
    device="cpu",
)
