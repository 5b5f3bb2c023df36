"""How vLLM reads a GPTQ config: the numbers it takes for each of its layers.

Source: `auto_gptq.py` and `utils/gptq_utils.py` of 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from qplug_converters.scheme import Scheme

from .facts import Facts, layer_of

MATCH_SECONDS = 1.0
"""Time limit for one pattern of `dynamic`; the patterns come from the file."""


@dataclass(frozen=True, slots=True)
class Stated:
    """The numbers that vLLM's config class has for one layer, as JSON gave them."""

    bits: Any
    group_size: Any
    sym: Any
    desc_act: Any

    def under(self, override: Mapping[str, Any]) -> Stated:
        """Return the numbers with those of a rule of `dynamic` instead."""
        return Stated(
            override.get("bits", self.bits),
            override.get("group_size", self.group_size),
            override.get("sym", self.sym),
            override.get("desc_act", self.desc_act),
        )


def base(facts: Facts) -> Stated:
    """Return the numbers of linears that no rule of `dynamic` names."""
    block = facts.block
    return Stated(*(block.get(key) for key in ("bits", "group_size", "sym", "desc_act")))


def dynamic(facts: Facts) -> dict[str, Mapping[str, Any]]:
    """Return the rules of `dynamic` that change numbers."""
    rules = facts.block.get("dynamic")
    if not isinstance(rules, Mapping):
        return {}
    return {
        text: values
        for text, values in rules.items()
        if isinstance(values, Mapping) and not text.startswith("-:")
    }


def everything_stated(facts: Facts) -> list[Stated]:
    """Return what the config says at any place."""
    stated = base(facts)
    return [stated, *(stated.under(values) for values in dynamic(facts).values())]


def as_read(facts: Facts) -> Iterator[tuple[str, Stated, Scheme]]:
    """Iterate over linears with the numbers that vLLM takes for the layer they are part of.

    A rule of `dynamic` is matched with the name of the fused layer, not with the linear's.
    """
    stated, rules = base(facts), dynamic(facts)
    if not rules:
        for module, scheme in facts.schemes():
            yield module, stated, scheme
        return
    known: dict[str, Stated] = {}
    for module, scheme in facts.linears.items():
        layer = layer_of(facts, module)
        if layer not in known:
            hit = next((v for text, v in rules.items() if _matches(text, layer)), None)
            known[layer] = stated if hit is None else stated.under(hit)
        yield module, known[layer], scheme


def _matches(text: str, layer: str) -> bool:
    try:
        pattern = regex.compile(text.removeprefix("+:"))
        return pattern.match(layer, timeout=MATCH_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError):
        return False
