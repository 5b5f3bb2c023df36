"""Gated MLPs, by the names in use: linears whose inner features may be reordered and padded.

What the last linear multiplies comes from the ones before it and passes only through elementwise
maps, so that inner features may stand in any order, and features of zeros add nothing.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import QplugError
from .format import Headers

PRODUCERS = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}
"""The last linear of an MLP, and the linears that make its inputs."""

WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
)
"""Keys of config.json that say how wide an MLP is inside."""

MEMBERS = frozenset(name for last, names in PRODUCERS.items() for name in (last, *names))


def families(modules: Iterable[str], headers: Headers) -> Mapping[str, tuple[str, ...]]:
    """Return the MLPs among `modules` by their last linear: the linears that make its inputs.

    Another tensor in the same MLP (a norm between the two) may depend on the order of features:
    such an MLP is left out.
    """
    known = set(modules)
    found = {}
    for module in known:
        parent, dot, last = module.rpartition(".")
        if last not in PRODUCERS:
            continue
        family = tuple(f"{parent}{dot}{name}" for name in (*PRODUCERS[last], last))
        found[module] = (f"{parent}{dot}", family)
    tails: dict[str, list[str]] = {prefix: [] for prefix, _ in found.values()}
    for name in headers:
        for prefix in _prefixes(name):
            if prefix in tails:
                tails[prefix].append(name)
    return {
        module: family[:-1]
        for module, (prefix, family) in sorted(found.items())
        if tails[prefix]
        and known.issuperset(family)
        and all(n.startswith(tuple(f"{member}." for member in family)) for n in tails[prefix])
    }


def make(width: int, shapes: Mapping[str, tuple[int, ...] | None], headers: Headers) -> bool:
    """Whether linears of these shapes `[out, in]`, by module, make `width` features each.

    Their biases must agree. Where they do not, the file says that these linears are not what makes
    the inputs of the last one.
    """
    for module, shape in shapes.items():
        bias = headers.get(f"{module}.bias")
        if shape is None or shape[0] != width or (bias is not None and bias.shape != (width,)):
            return False
    return True


def _prefixes(name: str) -> Iterable[str]:
    """Yield `a.`, `a.b.` … of a tensor's name."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)


def widened(config: Mapping[str, Any], widths: Mapping[int, int]) -> dict[str, Any]:
    """Return a config whose MLPs have the widths they were padded to.

    Raises
    ------
    QplugError
        If no key of the config says a width that was changed.
    """
    found = dict(config)
    for before, after in widths.items():
        places = [found]
        text = found.get("text_config")
        if isinstance(text, dict):
            found["text_config"] = text = dict(text)
            places.append(text)
        hits = [(place, key) for place in places for key in WIDTHS if place.get(key) == before]
        if not hits:
            raise QplugError(
                f"no key says {before}",
                "config.json",
                f"one of {', '.join(WIDTHS)}, to be changed to {after}",
                "leave out --tp",
            )
        for place, key in hits:
            place[key] = after
    return found
