"""What is measured: linears, ways to quantize them, numbers of tokens; what matters most of them.

Weights are drawn, not trained: speed does not depend on them, and rightness is shown better by
random codes, zeros and scales than by a model's, most of which are near the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from qplug_converters.formats.bnb_4bit import TABLES
from qplug_converters.scheme import Kind
from qplug_converters.weight import AffineGrid, CodebookGrid, QuantizedWeight, RowGrid

ALL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
FEW = (1, 16, 64)
FIRST = (1, 16)
"""Tokens: every number measured for 4 bits, those for other forms, and those that come first."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of a model."""

    name: str
    in_features: int
    out_features: int


LLAMA_3_8B = (
    Linear("qkv", 4096, 6144),
    Linear("o", 4096, 4096),
    Linear("gate_up", 4096, 28672),
    Linear("down", 14336, 4096),
)

TINY = (Linear("tiny", 256, 128), Linear("wide", 128, 256))
"""For a run that shows that everything works, on a CPU too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A way to quantize a linear, and how much of it is measured.

    Attributes
    ----------
    name
        In tables and options.
    bits, kind
        Of codes and their grid.
    group_size
        Inputs of a group; the block size of a codebook.
    symmetric
        Whether the zero is the midpoint.
    act_order
        Whether inputs lie in their groups in random order.
    dtype
        Of activations and scales.
    tokens
        Numbers of tokens.
    first
        Whether its `FIRST` come before everything else.
    """

    name: str
    bits: int = 4
    kind: Kind = Kind.AFFINE
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    dtype: torch.dtype = torch.float16
    tokens: tuple[int, ...] = FEW
    first: bool = False


BF16 = torch.bfloat16
FORMS = (
    Form(name="int4", symmetric=True, tokens=ALL, first=True),
    Form(name="int4-asym", tokens=ALL, first=True),
    Form(name="int4-act-order", symmetric=True, act_order=True, tokens=ALL),
    Form(name="int4-bf16", symmetric=True, dtype=BF16),
    Form(name="int4-asym-bf16", dtype=BF16),
    Form(name="int3", bits=3),
    Form(name="int2", bits=2),
    Form(name="int8", bits=8, symmetric=True),
    Form(name="nf4", kind=Kind.CODEBOOK, group_size=64, dtype=BF16, tokens=ALL),
    Form(name="int8-rows", bits=8, kind=Kind.ROWS),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that share a weight: one form of one linear, several numbers of tokens."""

    turn: int
    form: Form
    linear: Linear
    tokens: tuple[int, ...]


def turn(form: Form, tokens: int) -> int:
    """Return when a case has its turn, 0 first: what is cut when time runs out comes last."""
    if tokens in FIRST:
        return 0 if form.first else 1
    if tokens <= max(FEW):
        return 2
    return 3


def plan(forms: Sequence[Form], linears: Sequence[Linear], most: int = max(ALL)) -> list[Group]:
    """Return all cases of at most so many tokens, the most important first."""
    cases = [
        (turn(form, tokens), form, linear, tokens)
        for form in forms
        for linear in linears
        for tokens in form.tokens
        if tokens <= most
    ]
    cases.sort(key=lambda case: case[0])  # stable: forms and linears keep their order
    return [
        Group(*key, tuple(case[3] for case in same))
        for key, same in groupby(cases, key=lambda case: case[:3])
    ]


def named(names: Sequence[str], forms: Sequence[Form] = FORMS) -> list[Form]:
    """Return forms by name.

    Raises
    ------
    KeyError
        If there is none of a name.
    """
    known = {form.name: form for form in forms}
    return [known[name] for name in names]


def draw(form: Form, linear: Linear, device: torch.device | str, seed: int = 0) -> QuantizedWeight:
    """Return a random weight on a device, the same at each call."""
    made = torch.Generator(device=device).manual_seed(seed)
    rows, columns = linear.out_features, linear.in_features
    top = (1 << form.bits) - 1

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=made, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=made, device=device) + 0.5

    codes = integers(0, top, rows, columns).to(torch.uint8)
    if form.kind is Kind.ROWS:
        return QuantizedWeight(codes, form.bits, RowGrid(uniform(rows) * 0.05))
    if form.kind is Kind.CODEBOOK:
        table = torch.frombuffer(bytearray(TABLES["nf4"]), dtype=torch.float32).to(device)
        absmax = uniform(rows * columns // form.group_size) * 0.05
        return QuantizedWeight(codes, form.bits, CodebookGrid(table, absmax, form.group_size))
    groups = columns // form.group_size
    middle = 1 << (form.bits - 1)
    scales = (uniform(rows, groups) * 0.05 / middle).to(form.dtype)
    if form.symmetric:
        zeros = torch.full((rows, groups), middle, dtype=torch.int16, device=device)
    else:
        zeros = integers(middle - middle // 2, min(top, middle + middle // 2), rows, groups)
    g_idx = None
    if form.act_order:
        order = torch.randperm(columns, generator=made, device=device)
        g_idx = (order // form.group_size).to(torch.int32)
    grid = AffineGrid(scales, zeros.to(torch.int16), form.group_size, g_idx)
    return QuantizedWeight(codes, form.bits, grid)


def activations(
    form: Form, linear: Linear, tokens: int, device: torch.device | str
) -> torch.Tensor:
    """Return random activations `[tokens, in]`, the same at each call."""
    made = torch.Generator(device=device).manual_seed(tokens)
    drawn = torch.randn(tokens, linear.in_features, generator=made, device=device)
    return drawn.to(form.dtype)
