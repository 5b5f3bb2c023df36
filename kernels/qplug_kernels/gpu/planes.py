"""The layout of codes that the GPU kernels read: planes in 16-bit words, a tile in one piece.

    tensor  shape                      dtype  meaning
    words   [nN, nK, words, BN, KP]    int16  tile by tile: BN outputs by BK = planes * KP inputs
    scales  [nN, nS, BN, groups]       int32  scale in the low half, magic + zero in the high half,
                                              for the groups of a tile, or of several tiles (nS)
                                       int16  symmetric, two groups and more: scales alone
    order   [nK * BK], absent when     int32  the input at each place, -1 where there is none
            inputs are in order               (act order: places are sorted by group)
    form    [0, ...]                   of x   what the other shapes do not tell, as a shape

Word (output n, row r) of a tile holds one code of each plane: input p * KP + r of the tile in bits
[b * p, b * p + b). 3 bits take three words for 16 planes: word w holds planes 5w to 5w + 4, and
bit 15 of words 0, 1 and 2 the bits 0, 1 and 2 of plane 15. So rows of words are the inputs of a
matrix operand, a plane of a register pair is the operand of that plane, and its activations are
KP neighbours: nothing is permuted, on either side.

Padding: codes are 0 beyond the last input (activations are 0 there) and output; scales are 0 beyond
the last output. A tile is self-contained: packing a shard that begins and ends on tiles gives the
tiles of the whole.

bits / 8 bytes per weight, and 4 for every group, or 2. `Form.layout` is the definition as a
`Layout`; `pack` does it on any device in slabs of outputs, with at most `SLAB` codes of scratch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qplug_converters.scheme import Kind
from qplug_converters.weight import QuantizedWeight

from ..problem import Problem
from .asm import PLANES
from .form import COLUMNS, ROWS, SMALLEST, Form, Tiled, effective_group

SLAB = 1 << 24
"""Codes packed at a time: 16 MB, and three times that in words and masks."""


def pad(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """Return `[rows, columns]` with zeros behind what there is."""
    missing = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, missing) if any(missing) else tensor


def gather(codes: Tensor, order: Tensor | None) -> Tensor:
    """Return the columns `order [places]` of codes or activations, 0 where it is negative."""
    if order is None:
        return codes
    found = codes.index_select(1, order.clamp(min=0))
    return found.masked_fill_(order < 0, 0)


def scatter(columns: Tensor, order: Tensor, in_features: int) -> Tensor:
    """Return `[out, in_features]` of columns at places `order`: the inverse of `gather`.

    Columns of no input go behind the last one, so that nothing waits to know how many there are.
    """
    width = -(-(in_features + 1) // 16) * 16  # rows that a matmul can read 16 bytes at a time
    found = columns.new_empty(columns.shape[0], width)
    at = torch.where(order < 0, in_features, order).long()
    return found.index_copy_(1, at, columns)[:, :in_features]


def pack(codes: Tensor, form: Form, order: Tensor | None = None) -> Tensor:
    """Return the words of codes uint8 `[out, in]`, on their device.

    `order` int64 or int32 `[places]` says which input lies at each place, -1 for none.
    """
    many_n, many_k = form.tiles
    shape = (many_k, form.words, form.columns, form.rows)
    words = torch.empty((many_n, *shape), dtype=torch.int16, device=codes.device)
    width = many_k * form.tile
    step = max(1, SLAB // (width * form.columns))
    for at in range(0, many_n, step):
        tiles = min(step, many_n - at)
        slab = codes[at * form.columns : (at + tiles) * form.columns]
        slab = pad(gather(slab, order), tiles * form.columns, width)
        cut = slab.view(tiles, form.columns, many_k, form.planes, form.rows)
        _pack_slab(cut.permute(3, 0, 2, 1, 4), words[at : at + tiles], form.bits)
    return words


def _pack_slab(planes: Tensor, words: Tensor, bits: int) -> None:
    """Write codes `[planes, nN, nK, BN, KP]` into words `[nN, nK, words, BN, KP]`."""
    for word in range(words.shape[2]):
        into = words[:, :, word]
        per_word = 5 if bits == 3 else 16 // bits
        into.copy_(planes[per_word * word])
        for n in range(1, per_word):
            into |= planes[per_word * word + n].to(torch.int16) << (bits * n)
        if bits == 3:
            into |= (planes[15].to(torch.int16) >> word & 1) << 15


def unpack(words: Tensor, form: Form) -> Tensor:
    """Return codes uint8 `[nN * BN, nK * BK]`, padding included: the inverse of `pack`."""
    many_n, many_k = words.shape[:2]
    mask = (1 << form.bits) - 1
    per_word = 5 if form.bits == 3 else 16 // form.bits
    codes = torch.empty(
        (many_n, form.columns, many_k, form.planes, form.rows),
        dtype=torch.uint8,
        device=words.device,
    )
    for plane in range(per_word * form.words):
        word, field = divmod(plane, per_word)
        found = words[:, :, word] >> (form.bits * field) & mask
        codes[:, :, :, plane] = found.permute(0, 2, 1, 3)
    if form.bits == 3:
        bits = (words >> 15 & 1).unbind(2)
        last = bits[0] | bits[1] << 1 | bits[2] << 2
        codes[:, :, :, 15] = last.permute(0, 2, 1, 3)
    return codes.view(many_n * form.columns, many_k * form.tile)


def pack_scales(scales: Tensor, zeros: Tensor, form: Form) -> Tensor:
    """Return scale words of scales and zeros `[out, groups of the layout]`."""
    rows = form.tiles[0] * form.columns
    words = pad(scales.to(form.scale_dtype).view(torch.int16), rows, form.groups)
    if not form.symmetric:
        high = (pad(zeros, rows, form.groups) + form.magic).to(form.dtype).view(torch.int16)
        words = (high.to(torch.int32) << 16) | (words.to(torch.int32) & 0xFFFF)
    many_n, many_s, columns, each = form.scales_shape
    return words.view(many_n, columns, many_s, each).transpose(1, 2).contiguous()


def unpack_scales(words: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return scales and zeros in float32 `[nN * BN, groups of the layout]`."""
    flat = words.transpose(1, 2).reshape(-1, form.groups)
    scales = flat.to(torch.int16).view(form.scale_dtype).float()
    if form.symmetric:
        return scales, torch.full_like(scales, 1 << (form.bits - 1))
    high = (flat >> 16).to(torch.int16).view(form.dtype)
    return scales, high.float() - form.magic


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where inputs go: sorted by group.

    `order` int64 `[places]` is the input at each place, -1 for none; `None` where inputs are in
    order. `groups` int64 `[places]` is the group of each place. Every `unit` places from the first
    on belong to one group.
    """

    order: Tensor | None
    groups: Tensor
    unit: int


def arrange(weight: QuantizedWeight, problem: Problem) -> Places:
    """Sort inputs by group where they are not; fill groups up where they share no divisor.

    A shard of a linear in act order has groups of any number of inputs: each is filled up to a
    multiple of `SMALLEST` places.
    """
    groups = weight.affine.group_of_inputs(weight.in_features)
    if not problem.act_order:
        return Places(None, groups, weight.affine.group_size)
    order = torch.argsort(groups, stable=True)
    if problem.block % SMALLEST == 0:
        return Places(order, groups[order], problem.block)
    counts = torch.bincount(groups, minlength=weight.affine.scales.shape[1])
    filled = -(-counts // SMALLEST) * SMALLEST
    ends, filled_ends = counts.cumsum(0), filled.cumsum(0)
    of_place = torch.repeat_interleave(torch.arange(len(counts), device=groups.device), filled)
    inside = torch.arange(len(of_place), device=groups.device) - (filled_ends - filled)[of_place]
    there = inside < counts[of_place]
    found = order[((ends - counts)[of_place] + inside).clamp(max=len(order) - 1)]
    return Places(torch.where(there, found, -1), of_place, gcd(*filled_ends.tolist()) or SMALLEST)


def choose_form(weight: QuantizedWeight, problem: Problem, places: Places) -> Form:
    """Return the layout of a linear: the longest tile rows that its groups allow."""
    bits = container(weight.bits)
    count, rows = len(places.groups), ROWS[bits]
    while rows > SMALLEST and effective_group(places.unit, PLANES[bits] * rows, count) < rows:
        rows //= 2
    tile = PLANES[bits] * rows
    group = effective_group(places.unit, tile, count)
    symmetric = group < tile and problem.midpoint and bits == weight.bits
    return Form(
        weight.out_features,
        weight.in_features,
        count if places.order is None else -(-count // tile) * tile,
        bits,
        rows,
        COLUMNS,
        group,
        problem.dtype == torch.bfloat16,
        weight.affine.scales.dtype == torch.bfloat16,
        symmetric,
    )


def container(bits: int) -> int:
    """Return the bits that codes are stored in."""
    return next(wide for wide in PLANES if wide >= bits)


def encode(weight: QuantizedWeight, form: Form, places: Places) -> dict[str, Tensor]:
    """Return the operands of a linear on an affine grid."""
    first = places.groups[:: form.group]
    grid, device, order = weight.affine, weight.codes.device, places.order
    if order is not None:
        order = torch.nn.functional.pad(order, (0, form.places - len(order)), value=-1)
    operands = {
        "words": pack(weight.codes, form, order),
        "scales": pack_scales(grid.scales[:, first], grid.zeros[:, first], form),
        "form": form.tensor(device),
    }
    return operands if order is None else {**operands, "order": order.to(torch.int32)}


def cannot(problem: Problem) -> str | None:
    """Say why a linear does not fit the layout."""
    if problem.kind is Kind.OFFSET and not problem.whole_zeros:
        return "offsets are no integers times scales, and the layout holds integer zeros"
    if problem.kind not in (Kind.AFFINE, Kind.OFFSET):
        return f"weights lie on a grid of {problem.kind.value}, and the layout holds affine ones"
    smallest = problem.block if problem.act_order else problem.group_size
    if smallest % SMALLEST and not (problem.act_order and problem.group_size >= 2 * SMALLEST):
        return (
            f"groups of {problem.group_size} inputs are no multiple of {SMALLEST}, the shortest "
            "product of a tensor core"
        )
    if problem.scale_dtype == torch.float32 and not problem.scales_fit_f16:
        return "scales are float32 and outside the range of float16"
    return None


def dequantize(form: Form, operands: Sequence[Tensor]) -> Tensor:
    """Return the exact weight, float64 `[out, in]`: (code - zero) * scale."""
    words, scales = operands[:2]
    codes = unpack(words, form)[: form.out_features].double()
    scale, zero = (t[: form.out_features].double() for t in unpack_scales(scales, form))
    at = torch.arange(codes.shape[1], device=codes.device) // form.group
    weight = (codes - zero[:, at]) * scale[:, at]
    if len(operands) == 3:
        return weight[:, : form.in_features]
    there = operands[3] >= 0
    return torch.empty_like(weight[:, : form.in_features]).index_copy_(
        1, operands[3][there].long(), weight[:, there]
    )


def aligned(x: Tensor) -> Tensor:
    """Return `x [M, K]` with rows that loads of 16 bytes may read: a copy where they may not.

    Triton compiles another, slower kernel for rows at a stride that is no multiple of 16 elements;
    that is left to rows whose own length is none.
    """
    if x.stride(1) != 1 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    if x.shape[0] == 1:
        return x.as_strided(x.shape, (x.shape[1], 1))  # its own stride says nothing, and may be odd
    if x.stride(0) % 16 and x.shape[1] % 16 == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return x


_CHECKED = WeakIdKeyDictionary()
"""Words to their layout and the operands that were checked with them."""

Found = TypeVar("Found")
Fitting = TypeVar("Fitting", bound=Tiled)


def once(operands: Sequence[Tensor], check: Callable[[Sequence[Tensor]], Found]) -> Found:
    """Return `check(operands)`, remembered for these very tensors: a tenth of the time."""
    words, *others = operands
    known = _CHECKED.get(words)
    if known is not None:
        found, seen = known
        if len(seen) == len(others) and all(map(_is, seen, others)):
            return cast(Found, found)
    checked = check(operands)
    _CHECKED[words] = checked, tuple(map(weakref.ref, others))
    return checked


def _is(one: weakref.ref[Tensor], other: Tensor) -> bool:
    return one() is other


def check(
    layout: Callable[[Sequence[Tensor]], Fitting],
    x: Tensor,
    operands: Sequence[Tensor],
    bias: Tensor | None,
) -> Fitting:
    """Return `layout(operands)`, or say what is wrong before anything is launched.

    Raises
    ------
    ValueError
        If a shape, dtype, stride or device is not that of a kernel's table.
    """
    form = once(operands, layout)
    check_x(form, x, bias, operands[0].device)
    return form


def check_x(form: Tiled, x: Tensor, bias: Tensor | None, device: torch.device) -> None:
    """Refuse activations and a bias that do not fit a layout.

    Raises
    ------
    ValueError
        If a shape, dtype or device is wrong.
    """
    wanted = {"x": (x, ("M", form.in_features)), "bias": (bias, (form.out_features,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape) and tensor.shape[-1] == shape[-1]
        if not fits or tensor.dtype != form.dtype or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
                f"{form.dtype} [{', '.join(map(str, shape))}] on {device}"
            )


def check_operands(form: Form, operands: Sequence[Tensor]) -> None:
    """Refuse operands that are not those of a layout, or not in one piece.

    Raises
    ------
    ValueError
        If a shape, dtype, stride or device is wrong.
    """
    (many_n, many_k), device = form.tiles, operands[0].device
    wanted = (
        ("words", torch.int16, (many_n, many_k, form.words, form.columns, form.rows)),
        ("scales", torch.int16 if form.symmetric else torch.int32, form.scales_shape),
        ("order", torch.int32, (many_k * form.tile,)),
    )
    for tensor, (name, dtype, shape) in zip((*operands[:2], *operands[3:]), wanted, strict=False):
        check_tensor(name, tensor, dtype, shape, device)


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse one operand that is not what it must be.

    Raises
    ------
    ValueError
        If its dtype, shape, device or stride is wrong.
    """
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
            f"{dtype} {list(shape)} on {device}"
        )
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(f"{name} is not in one piece that begins at a multiple of 16 bytes")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` in float64, rounded once to the dtype of `x`."""
    y = x.double() @ weight.T
    return (y if bias is None else y + bias.double()).to(x.dtype)
