"""AWQ GEMV_FAST as AutoAWQ 0.2.9 writes it, and llm-awq's second version: the same tensors.

| name                       | dtype   | shape       | packed along                              |
|----------------------------|---------|-------------|-------------------------------------------|
| `qweight`                  | int16   | [out/4, in] | tiles of 4 outputs by 64 inputs, as below |
| `scales`                   | float16 | [zw*8, out] | -                                         |
| `qzeros` or `scaled_zeros` | float16 | [zw*8, out] | -; -(scale * zero), rounded to float16    |

w[n, k] = code * scales[k // G, n] + zeros[k // G, n]. AutoAWQ (`version: gemv_fast`) calls the last
one `qzeros`, llm-awq (`version: llm-awq`) `scaled_zeros`. zw is that of GEMV. Code (n, k) of
n = 4a + r and k = 64c + 32h + 8 t3 + 2 t2 + t1 is code 64r + 32h + 8 t2 + 4 t1 + t3 of the bit
stream of tile c of row a. in is a multiple of 64 and of G, out of 8.

Traps. The rounded product makes the grid one of offsets: the integer zero is rint(-zeros / scale),
and the weights are those of an affine grid only where every product is exact in float16 (symmetric
files always). A zero of 0 is stored as -0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..format import Block, Format, Headers, Peek
from ..layout import Holds, Layout, Packing, Part
from ..scheme import Kind, ModelScheme, Scheme
from .awq import CAPACITY, check_stored, claims_kind, parse_as, read_with, write_as
from .awq_gemv import GROUPS, check_groups, padding, with_group_size


def layout_as(zeros: str) -> Callable[[Scheme], Layout]:
    """Return the `layout` in which the offsets are called `zeros`."""

    def layout(scheme: Scheme) -> Layout:
        padded = padding(scheme.group_size)
        return Layout(
            (
                Part(
                    name="qweight",
                    holds=Holds.CODES,
                    dtype="I16",
                    stream="(out r) (inp h t3 t2 t1) -> out (inp r h t2 t1 t3)",
                    packing=Packing(4, word="I16"),
                    lengths=(("r", 4), ("h", 2), ("t3", 4), ("t2", 4), ("t1", 2)),
                ),
                Part(
                    name="scales",
                    holds=Holds.SCALES,
                    dtype=scheme.scale_dtype,
                    stream="out group -> group out",
                    multiple=padded,
                ),
                Part(
                    name=zeros,
                    holds=Holds.OFFSETS,
                    dtype=scheme.scale_dtype,
                    stream="out group -> group out",
                    multiple=padded,
                ),
            )
        )

    return layout


def _format(kind: str, name: str, aliases: tuple[str, ...], title: str, zeros: str) -> Format:
    """Return the format of one tool."""
    parse, layout = parse_as(kind, name), layout_as(zeros)

    def claims(block: Block | None, headers: Headers) -> bool:
        return claims_kind(kind, block, headers)

    def read(block: Block | None, headers: Headers, peek: Peek) -> ModelScheme:
        claim = parse(block)
        check_stored(headers, kind)
        claim = with_group_size(claim, layout(Scheme(32, 64, 4, 32)), headers, peek)
        model = check_groups(read_with(claim, layout, headers, peek, kind))
        linears = {m: replace(s, kind=Kind.OFFSET) for m, s in model.linears.items()}
        return replace(model, linears=linears)

    return Format(
        name=name,
        aliases=aliases,
        title=title,
        capacity=replace(
            CAPACITY,
            in_multiple=lambda bits: 64,
            group_sizes=GROUPS,
            kind=Kind.OFFSET,
        ),
        claims=claims,
        layout=layout,
        parse=parse,
        read=read,
        write=write_as(kind),
    )


FORMAT = _format(
    "gemv_fast",
    "awq_gemv_fast",
    ("awq-gemv_fast", "awq-gemv-fast", "gemv_fast"),
    "AWQ GEMV_FAST (AutoAWQ): 4 bits, 16-bit tiles, scaled zeros",
    "qzeros",
)

LLM_AWQ = _format(
    "llm-awq",
    "llm_awq",
    ("llm-awq",),
    "llm-awq: as AWQ GEMV_FAST, zeros under another name",
    "scaled_zeros",
)
