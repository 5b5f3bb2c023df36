"""Quantization configs, wherever they lie: config.json, its text_config, old side files.

Several may say something; they must agree on what decides the weights. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import QplugError

Place = tuple[Any, str]
"""A block as JSON gave it, and the name of the place."""

_DECIDING = (
    ("quant_method", "method"),
    ("bits", "w_bit", "wbits", "weight_bits"),
    ("group_size", "q_group_size", "groupsize"),
    ("sym",),
    ("zero_point",),
    ("checkpoint_format", "format"),
    ("version",),
)
"""Keys with their aliases on which two places must agree; of act order, `g_idx` decides."""


def of_model_config(config: Mapping[str, Any], name: str = "config.json") -> list[Place]:
    """Return the places of a config.json, in the order of their weight."""
    places: list[Place] = [
        (config.get("quantization_config"), f"{name} quantization_config"),
        (config.get("compression_config"), f"{name} compression_config"),
    ]
    text = config.get("text_config")
    if isinstance(text, dict):
        places.append((text.get("quantization_config"), f"{name} text_config"))
    return places


def merged(places: Sequence[Place]) -> tuple[dict[str, Any] | None, str, tuple[str, ...]]:
    """Return what all places say together, the name of the first, and what is odd about them.

    Where several say something, the first place counts, and the others fill what it leaves out:
    Transformers drops keys (`dynamic`, `meta`) that a side file still has.

    Raises
    ------
    QplugError
        If one is no object, or two disagree on what decides the weights.
    """
    present = [(block, where) for block, where in places if block is not None]
    for block, where in present:
        if not isinstance(block, dict):
            raise QplugError(f"{block!r}", where, "a JSON object", "correct the config")
    if not present:
        return None, "nowhere", ()
    first, at = present[0]
    notes = []
    for block, where in present[1:]:
        _compare(first, at, block, where)
        one, two = first.get("desc_act"), block.get("desc_act")
        if isinstance(one, bool) and isinstance(two, bool) and one is not two:
            notes.append(
                f"desc_act is {str(one).lower()} in {at} and {str(two).lower()} in {where}: "
                "g_idx decides"
            )
    whole: dict[str, Any] = {}
    for block, _ in present:
        for key, value in block.items():
            if whole.get(key) is None:
                whole[key] = value
    return whole, at, tuple(notes)


def _compare(first: dict[str, Any], at: str, second: dict[str, Any], where: str) -> None:
    """Refuse two config blocks that disagree on what decides the weights."""

    def plain(value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    for names in _DECIDING:
        one, two = (
            next((b[n] for n in names if b.get(n) is not None), None) for b in (first, second)
        )
        if one is not None and two is not None and plain(one) != plain(two):
            raise QplugError(
                f"{names[0]} {one!r} in {at} and {two!r} in {where}",
                "the configs",
                "the same in both",
                "remove the wrong one",
            )
