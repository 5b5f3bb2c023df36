"""`Format`: how one tool names, stores and configures quantized linears.

A format file is a table and a docstring; it holds functions as fields and nothing inherits from
it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .claim import Claim
from .layout import Layout, TensorSpec
from .scheme import Kind, ModelScheme, Scheme

Block = Mapping[str, Any]
"""A quantization config block as JSON gave it."""
Headers = Mapping[str, TensorSpec]
"""Every tensor of a checkpoint by name."""
Peek = Callable[[str], NDArray[np.generic]]
"""Read one small tensor that decides (g_idx, zeros) as a NumPy array; bfloat16 comes as uint16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a format can hold, as data; a plan compares a scheme with it.

    Attributes
    ----------
    bits
        Bit widths.
    zeros
        Lowest and highest zero at given bits that every reader of the format agrees on.
    act_order
        Whether a non-trivial `g_idx` can be stored.
    ragged
        Whether the last group may be short.
    scale_dtypes
        Dtypes of scales that the format's readers take; the first is preferred.
    uniform
        Whether the config can name one group size only, for the whole model.
    group_sizes
        The group sizes that can be stored; empty: any.
    kind
        The grid its codes lie on.
    also
        Other grids that it holds as they are.
    in_multiple, out_multiple
        What in_features and out_features must be multiples of at given bits.
    """

    bits: tuple[int, ...]
    zeros: Callable[[int], tuple[int, int]]
    act_order: bool
    ragged: bool
    scale_dtypes: tuple[str, ...]
    in_multiple: Callable[[int], int]
    out_multiple: Callable[[int], int]
    uniform: bool = False
    group_sizes: tuple[int, ...] = ()
    kind: Kind = Kind.AFFINE
    also: tuple[Kind, ...] = ()


def _always(scheme: Scheme) -> bool:
    return True


def _plain(scheme: Scheme) -> Scheme:
    """Restate a scheme as most formats do: groups in order, zeros as they are, words filled."""
    return replace(
        scheme,
        has_g_idx=False,
        zero_rule="as_is",
        desc_act=False,
        per_word=0,
        shared=False,
        lacks=(),
    )


@dataclass(frozen=True, slots=True)
class Written:
    """What a format writes besides tensors: the config block and its side files."""

    block: Mapping[str, Any] | None
    side_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A tool's way.

    Attributes
    ----------
    name, aliases
        What `--from` and `--to` take; `<name>-layout` works too.
    title
        One line for tables.
    capacity
        What it can hold; `None` for a format that holds no codes (dense).
    claims
        `(block, headers) -> bool`: whether a checkpoint is of this format, the config first.
    layout
        The stored tensors of one linear.
    parse
        `block -> Claim`: what a config says, judged alone; collects every problem. `None` where
        there is no config (dense).
    read
        `(block, headers, peek) -> ModelScheme`; collects every problem and raises them together.
        `None` for a format that is a target only.
    adopt
        `scheme -> scheme`: the same numbers as this format states them (flags, zero rule, g_idx);
        left out: no g_idx, and the stored zero is the zero.
    write
        The config of a whole model.
    shard_stem
        First part of the names of the shards.
    zero_rules
        Rules that files of this format may have been stored by, those to try on a symmetric file
        first; empty where there is only one.
    foreign_rules
        Rules of files labelled wrongly, with what such a file really is.
    says_kv
        Whether its config says how the KV cache is quantized.
    current
        `scheme -> bool`: whether readers of today take a linear stored like this; one that they
        do not take is written anew where others would be copied.
    decisive
        Keys of the config that two files must not differ in. Those that describe linears are not
        among them: they are compared with the tensors when a file is read, in either file.
    keys
        Keys of its config beside those that several tools use (`judge.KNOWN_KEYS`).
    """

    name: str
    aliases: tuple[str, ...] = ()
    title: str
    capacity: Capacity | None
    claims: Callable[[Block | None, Headers], bool]
    layout: Callable[[Scheme], Layout]
    parse: Callable[[Block | None], Claim] | None = None
    read: Callable[[Block | None, Headers, Peek], ModelScheme] | None
    adopt: Callable[[Scheme], Scheme] = _plain
    write: Callable[[ModelScheme], Written]
    shard_stem: str = "model"
    zero_rules: tuple[str, ...] = ()
    foreign_rules: tuple[tuple[str, str], ...] = ()
    current: Callable[[Scheme], bool] = _always
    says_kv: bool = False
    decisive: tuple[str, ...] = (
        "quant_method",
        "checkpoint_format",
        "format",
        "version",
        "lm_head",
        "pack_dtype",
    )
    keys: frozenset[str] = frozenset()

    def cannot(self, scheme: Scheme) -> str | None:
        """Return why this format cannot hold `scheme` as it is, or `None`."""
        holds = self.capacity
        if holds is None:
            return None
        if scheme.kind in holds.also:
            return None
        if scheme.kind is not holds.kind:
            return f"{self.name} holds no {scheme.kind.value} grids"
        if scheme.bits not in holds.bits:
            return f"{self.name} holds {_listed(holds.bits)} bits, not {scheme.bits}"
        if scheme.act_order and not holds.act_order:
            return f"{self.name} has no g_idx, and the columns are in act order"
        if not holds.ragged and scheme.in_features % scheme.group_size:
            return (
                f"{self.name} needs whole groups, and {scheme.in_features} inputs are not a "
                f"multiple of {scheme.group_size}"
            )
        for name, size, step in (
            ("in_features", scheme.in_features, holds.in_multiple(scheme.bits)),
            ("out_features", scheme.out_features, holds.out_multiple(scheme.bits)),
        ):
            if size % step:
                return f"{self.name} needs {name} in multiples of {step}, not {size}"
        if scheme.zeros is not None:
            low, high = holds.zeros(scheme.bits)
            if scheme.zeros.lowest < low or scheme.zeros.highest > high:
                return (
                    f"{self.name} holds zeros from {low} to {high}, not "
                    f"{scheme.zeros.lowest} to {scheme.zeros.highest}"
                )
        if holds.group_sizes and scheme.group_size not in holds.group_sizes:
            return f"{self.name} holds groups of {_listed(holds.group_sizes)}"
        if scheme.scale_dtype not in holds.scale_dtypes:
            return f"{self.name} holds {_listed(holds.scale_dtypes)} scales"
        return None


def _listed(items: tuple[object, ...]) -> str:
    return ", ".join(map(str, items))
