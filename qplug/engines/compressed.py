"""Properties of compressed-tensors configs and checkpoints (see `properties`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .facts import Facts
from .properties import MARLIN_GROUPS


def _weights(facts: Facts) -> list[Mapping[str, Any]]:
    """Return the `weights` of every config group."""
    groups = facts.block.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in found if isinstance(group, Mapping)]
    return [each for each in weights if isinstance(each, Mapping)]


def order(facts: Facts) -> str | None:
    """Whether a config group claims act order that needs a `weight_g_idx`."""
    order = next((w["actorder"] for w in _weights(facts) if w.get("actorder")), None)
    return f"actorder: {order}" if order in ("group", "dynamic", True) else None


def index(facts: Facts) -> str | None:
    """Whether there is a `weight_g_idx` that no config group speaks of."""
    return "weight_g_idx" if any(s.has_g_idx for s in facts.linears.values()) else None


def tensor(facts: Facts) -> str | None:
    """Whether one scale is shared by a whole linear."""
    for weights in _weights(facts):
        if weights.get("strategy") == "tensor":
            return "strategy: tensor"
    return None


def other_kernels(facts: Facts) -> str | None:
    """Whether Marlin, which every GPU since Turing has, is no kernel for it."""
    for weights in _weights(facts):
        bits, sym = weights.get("num_bits", 8), weights.get("symmetric", True)
        size = weights.get("group_size")
        if (bits, sym) not in ((4, True), (8, True), (4, False)):
            return f"{bits}-bit {'symmetric' if sym else 'asymmetric'}: not every GPU has a kernel"
        if size is not None and size not in MARLIN_GROUPS:
            return f"group size {size}: not every GPU has a kernel"
    return None


def asymmetric(facts: Facts) -> str | None:
    """Whether zero points are stored."""
    asym = any(weights.get("symmetric") is False for weights in _weights(facts))
    return "zero points do not fit the shape that it expects" if asym else None


def odd_bits(facts: Facts) -> str | None:
    """Whether codes may cross words or not."""
    bits = next((b for w in _weights(facts) if 32 % (b := w.get("num_bits", 8))), None)
    return f"{bits} bits: packings of two releases" if bits is not None else None


def eight_bits(facts: Facts) -> str | None:
    """Whether anything is not 4 bits."""
    bits = next((b for w in _weights(facts) if (b := w.get("num_bits", 8)) != 4), None)
    return f"{bits} bits: its CPU kernels take 4" if bits is not None else None


def scales(facts: Facts) -> str:
    """Every checkpoint has it; says what becomes of KV scales."""
    asked = facts.block.get("kv_cache_scheme")
    return "its scales of the KV cache are not used" if facts.kv_scales and not asked else ""
