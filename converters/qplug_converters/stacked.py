"""Stacked experts: one tensor for all experts of a layer, presented as one linear per expert.

compressed-tensors packs a weight of three axes slice by slice (0.20 `pack_to_int32`), so that
`<layer>.experts.gate_up_proj.weight_packed` [experts, out, words] is the packed linears of the
experts laid end to end, and half the outputs of `gate_up_proj` are `gate_proj`, the other half
`up_proj`. Each linear is a range of bytes of the file: nothing is copied. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layout import TensorSpec
from .shards import Location

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
HALVES = ("gate_proj", "up_proj")
TRANSPOSED = ("aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter")
"""Model types whose stacked experts are [experts, in, out], or interleave gate and up."""


def unstack(
    locations: Mapping[str, Location], config: Mapping[str, Any]
) -> dict[str, Location] | None:
    """Return the tensors with stacked experts taken apart, or `None` where there are none.

    `<layer>.experts.down_proj.weight_packed` becomes `<layer>.experts.<n>.down_proj.weight_packed`.
    The `weight_shape` of a half of `gate_up_proj` still counts the outputs of both. What cannot be
    cut where the halves meet, or may be transposed, is left as it is.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    if config.get("model_type") in TRANSPOSED or text.get("model_type") in TRANSPOSED:
        return None
    found: dict[str, Location] = {}
    taken: set[str] = set()
    for name in locations:
        module, _, part = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if part != "weight_packed" or len(locations[name].spec.shape) != 3 or not parent:
            continue
        stored = {p: locations[f"{module}.{p}"] for p in PARTS if f"{module}.{p}" in locations}
        leaves = HALVES if leaf == "gate_up_proj" else (leaf,)
        if not _alike(stored) or (leaves == HALVES and not _meet(stored, text.get("hidden_size"))):
            continue
        cuts = {
            f"{parent}.{number}.{new}.{p}": _cut(whole, p, number, which, len(leaves))
            for number in range(locations[name].spec.shape[0])
            for which, new in enumerate(leaves)
            for p, whole in stored.items()
        }
        if not cuts.keys() & locations.keys():
            found |= cuts
            taken |= {f"{module}.{p}" for p in stored}
    if not found:
        return None
    return {n: at for n, at in locations.items() if n not in taken} | found


def _alike(stored: Mapping[str, Location]) -> bool:
    """Whether every tensor has a slice for each expert, and `weight_shape` three sizes."""
    shapes = {part: location.spec.shape for part, location in stored.items()}
    experts = shapes["weight_packed"][0]
    sizes = shapes.pop("weight_shape", None)
    each = all(len(s) == 3 and s[0] == experts and 0 not in s for s in shapes.values())
    return each and sizes == (3,) and "weight_scale" in shapes


def _meet(stored: Mapping[str, Location], hidden: Any) -> bool:
    """Whether the inputs are those of the layer, and no word holds outputs of both halves."""
    _, outputs, words = stored["weight_packed"].spec.shape
    if not isinstance(hidden, int) or not -(-hidden // 32) <= words <= -(-hidden // 4):
        return False
    return outputs % (64 if "weight_zero_point" in stored else 2) == 0


def _cut(whole: Location, part: str, number: int, which: int, halves: int) -> Location:
    """Return the bytes of one expert's tensor, or of one half of it."""
    if part == "weight_shape":
        size = whole.spec.nbytes // 3
        return Location(whole.file, whole.offset + size, TensorSpec(whole.spec.dtype, (2,)))
    shape = (whole.spec.shape[1] // halves, *whole.spec.shape[2:])
    spec = TensorSpec(whole.spec.dtype, shape)
    return Location(whole.file, whole.offset + (number * halves + which) * spec.nbytes, spec)
