"""Which tokens meet which expert: pairs of a token and an expert, in blocks of one expert each.

    tensor   shape          dtype     meaning
    ids      [T, topk]      integers  the experts of each token; outside 0 to E - 1: none
    pairs    [blocks * BM]  int32     pairs t * topk + n, expert by expert; T * topk where there is
                                      none: each expert's last block is filled up with that
    experts  [blocks]       int32     the expert of each block, -1 behind the last one

No shape depends on what the router chose: there are as many blocks as the worst case needs, no
expert with a whole number of blocks, and no more than pairs. So nothing waits for the device, and a
graph that is captured once serves every choice.

Each expert's tokens keep their order. The products of a pair do not depend on its place, so results
do not depend on what else a block holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compat
from .compat import jit_for_any, tl

SPAN = 1024
"""Outputs of a program that adds up a token's experts."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a launch over experts takes besides the operands.

    Attributes
    ----------
    pairs, experts
        As in the table.
    rows
        Rows of the result: T * topk.
    share
        Neighbouring pairs that read one row of the activations: topk, or 1 where each has its own.
    weights
        float32 `[rows]` that the products are multiplied by; the result is then float32.
    """

    pairs: Tensor
    experts: Tensor
    rows: int
    share: int
    weights: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a kernel that it does not take without experts."""
        return {
            "pairs": self.pairs,
            "experts": self.experts,
            "weights": self.weights,
            "share": self.share,
        }


def extent(
    x: Tensor, block: int, routing: Routing | None
) -> tuple[int, int, torch.dtype, dict[str, Any]]:
    """Return the rows of a result, its blocks, its dtype, and the arguments that say which."""
    if routing is None:
        return x.shape[0], -(-x.shape[0] // block), x.dtype, {}
    dtype = x.dtype if routing.weights is None else torch.float32
    return routing.rows, len(routing.experts), dtype, routing.arguments


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Return the most blocks that any routing needs."""
    return min((pairs + experts * (block - 1)) // block, pairs)


def align(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Return `pairs` and `experts` of ids `[T, topk]`, T * topk > 0, on their device."""
    flat = ids.flatten()
    many, device = len(flat), ids.device
    known = torch.where((flat >= 0) & (flat < experts), flat, experts)
    found, order = torch.sort(known, stable=True)
    numbers = torch.arange(experts, dtype=found.dtype, device=device)
    starts, ends = (torch.searchsorted(found, numbers, right=right) for right in (False, True))
    blocks = (ends - starts + (block - 1)) // block
    last = blocks.cumsum(0)
    at = torch.arange(most_blocks(many, experts, block), device=device)
    expert = torch.searchsorted(last, at, right=True)
    here = expert.clamp(max=experts - 1)
    first = starts[here] + (at - last[here] + blocks[here]) * block
    place = first[:, None] + torch.arange(block, device=device)
    inside = (place < ends[here, None]) & (expert < experts)[:, None]
    pairs = torch.where(inside, order[place.clamp(max=many - 1)], many)
    numbered = torch.where(expert < experts, expert, -1)
    return pairs.flatten().to(torch.int32), numbered.to(torch.int32)


@jit_for_any("many")
def combine_kernel(parts, ids, y, N, many, TOPK: tl.constexpr, SPAN: tl.constexpr):
    """Add the experts of one token in the order of its ids; those that are none add nothing."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    total = tl.zeros((SPAN,), tl.float32)
    for n in tl.static_range(TOPK):
        pair = token * TOPK + n
        expert = tl.load(ids + pair)
        width = tl.where((expert >= 0) & (expert < many), N, 0)
        total += tl.load(parts + pair * N + at, mask=at < width, other=0.0)
    tl.store(y + token * N + at, total.to(y.dtype.element_ty), mask=at < N)


def combine(parts: Tensor, ids: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """Return `[T, N]`: the sum of parts float32 `[T * topk, N]` over each token's experts."""
    (tokens, topk), width = ids.shape, parts.shape[1]
    wide = torch.float32 if compat.interpreted() else dtype
    y = torch.empty((tokens, width), dtype=wide, device=parts.device)
    with compat.on(parts.device):
        combine_kernel[tokens, -(-width // SPAN)](
            parts, ids.contiguous(), y, width, experts, TOPK=topk, SPAN=SPAN
        )
    return y.to(dtype)
