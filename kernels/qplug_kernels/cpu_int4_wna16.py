"""4-bit weights at bfloat16 on a CPU inside vLLM: torch's int4 pack, then vLLM's matrix-unit matmul.

    tensor      shape              dtype     meaning
    pack        [N, K/2]           uint8     as in `cpu_int4`
    scale_zero  [K/g, N, 2]        bfloat16  as in `cpu_int4`
    tiles       [N/16, K, 2]       int32     8 codes of neighbouring outputs a word, lowest first;
                                             16 outputs of all inputs lie together
    scales      [K/g, N]           bfloat16
    zeros       [K/g, N/8]         int32     8 zeros a word, lowest first
    order       [K], absent when   int32     the input at each sorted place (act order)
                inputs are in order
    x, result   [M, K], [M, N]     bfloat16  x @ w.T + bias

w = (code - zero) * scale. 1 + 6.5/g bytes per weight: 1.20 for groups of 32, 1.05 for 128.

`cpu_gemm_wna16` is an operation of vLLM's CPU build (0.30 and later), registered in the process of
its workers and nowhere else. It decodes faster than torch can, but costs as much for one token as
for 16. One Xeon core with AMX-bf16, microseconds, dense bf16 | pack | tiles:

    M          1                   8                    16                   64                   256
    576x1536   116 |  44 |  170    120 |  157 |  167    123 |  310 |  196    210 |  1231 |  242   442 | 4972 | 438
    4096x4096  2068 | 815 | 3274   2063 | 3058 | 3310   2154 | 5888 | 3534   3722 | 24695 | 4881  9846 | 94000 | 10317

Without the matrix unit it is as slow as `pack` at every M and the kernel refuses.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight

from .cpu_int4 import cannot_pack, multiply_pack, pack, sort_inputs, spread_blocks, unsort
from .problem import Kernel, Problem

FEW = 8
"""Most tokens for `pack`: its time crosses that of `tiles` between 8 and 9 in both shapes."""


def cannot(problem: Problem) -> str | None:
    """Say why a problem is not for this kernel."""
    reason = cannot_pack(problem)
    if reason is not None:
        return reason
    if problem.kind is not Kind.AFFINE:
        return "offsets are no integers times scales, and the operation subtracts integers"
    if "wna16" not in problem.ops:
        return "vLLM's CPU operations are not loaded in this process"
    if "amx" not in problem.features:
        return f"vLLM's operation is fast with AMX only, and this is {problem.machine}"
    if problem.in_features % 32 or problem.out_features % 32:
        return (
            f"{problem.in_features} inputs and {problem.out_features} outputs are not both "
            "multiples of 32"
        )
    if problem.highest_zero > 15:
        return f"a zero is {problem.highest_zero}, and the operation holds 0 to 15"
    return None


def _words(fields: Tensor) -> Tensor:
    """Pack uint8 `[..., 8]` into int32 `[...]`, lowest nibble first."""
    pairs = (fields[..., ::2] | (fields[..., 1::2] << 4)).contiguous()
    return pairs.view(torch.int32).squeeze(-1)


def prepare(weight: QuantizedWeight, problem: Problem) -> dict[str, Tensor]:
    """Return the operands of the table."""
    codes, order = sort_inputs(weight, problem)
    tensors = pack(weight, problem, codes)
    group = problem.in_features // tensors["scale_zero"].shape[0]
    scales, zeros = spread_blocks(weight, group)
    tiles = codes.view(-1, 2, 8, problem.in_features).permute(0, 3, 1, 2)
    tensors["tiles"] = _words(tiles)
    tensors["scales"] = scales.T.to(torch.bfloat16).contiguous()
    tensors["zeros"] = _words(zeros.T.to(torch.uint8).reshape(scales.shape[1], -1, 8))
    return tensors if order is None else {**tensors, "order": order}


def multiply_tiles(
    x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply many tokens `x [M, K]`."""
    result = x.new_empty(x.shape[0], scales.shape[1])
    torch.ops._C.cpu_gemm_wna16(
        x.contiguous(), tiles.flatten(1), result, scales, zeros, bias, 8, "amx"
    )
    return result


def run(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Multiply `x [M, K]`."""
    packed, scale_zero, tiles, scales, zeros = operands[:5]
    if len(operands) == 6:
        x = x.index_select(1, operands[5])
    if x.shape[0] > FEW:
        return multiply_tiles(x, tiles, scales, zeros, bias)
    result = multiply_pack(x, packed, scale_zero)
    return result if bias is None else result.add_(bias)


def dequantize(operands: Sequence[Tensor]) -> Tensor:
    """Return the weight out of `tiles`."""
    tiles, scales, zeros = operands[2:5]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (tiles.unsqueeze(-1) >> shifts & 15).permute(0, 2, 3, 1).flatten(0, 2)
    group = tiles.shape[1] // scales.shape[0]
    offsets = (zeros.unsqueeze(-1) >> shifts & 15).flatten(1).T.repeat_interleave(group, 1)
    weight = (codes - offsets).float() * scales.T.float().repeat_interleave(group, 1)
    return unsort(weight.bfloat16(), operands[5] if len(operands) == 6 else None)


KERNEL = Kernel(
    name="cpu_int4_wna16",
    title=f"torch's int4 pack up to {FEW} tokens, above that vLLM's matmul on the matrix unit",
    cannot=cannot,
    prepare=prepare,
    run=run,
    dequantize=dequantize,
    device="cpu",
)
