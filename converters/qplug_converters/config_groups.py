"""What a compressed-tensors config says: groups of modules, their schemes, and what is left out.

The keys are those of release 0.20.0 (`QuantizationConfig`, `QuantizationArgs`) with its defaults.
Nothing here imports torch.
"""

from __future__ import annotations

import re

from .block import Keys
from .claim import Claim, Stated
from .errors import raise_all
from .format import Block
from .patterns import finder

BITS = tuple(range(1, 9))
OTHERS = {
    "int-quantized": "int8 weights, for int8 activations",
    "naive-quantized": "unpacked weights, for quantized activations",
    "float-quantized": "float8 weights",
    "nvfp4-pack-quantized": "4-bit floats with float8 scales (NVFP4)",
    "mxfp4-pack-quantized": "4-bit floats with power-of-two scales (MXFP4)",
    "mxfp6-pack-quantized": "6-bit floats with power-of-two scales (MXFP6)",
    "mxfp8-quantized": "8-bit floats with power-of-two scales (MXFP8)",
    "marlin-24": "2:4 sparse Marlin tiles",
    "sparse-bitmask": "sparse weights",
    "sparse-24-bitmask": "2:4 sparse weights",
    "dense": "weights that are not quantized",
    "fakequant": "weights that are not compressed",
}
"""Values of `format` that are known and have no layout here."""
LEAVE = "serve it with an engine that reads it"
"""What to do with a checkpoint that is not weight-only."""


def _weights(keys: Keys) -> Stated | None:
    """Read the `weights` of a config group: `group_size` is `None` for the strategy `tensor`."""
    bits = keys.get(int, "num_bits", default=8)
    sym = keys.get(bool, "symmetric", default=True)
    size = keys.get(int, "group_size")
    kind = keys.get(str, "type", default="int").lower()
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = keys.get(str, "strategy", default=implied).lower()
    if kind != "int":
        keys.problem("type", f"{bits} bits of type {kind!r}", "'int': no floats are read", LEAVE)
    if bits not in BITS:
        keys.problem("num_bits", f"{bits}", "1 to 8")
    if keys.block.get("dynamic") not in (None, False):
        keys.problem("dynamic", f"{keys.block['dynamic']!r}", "false: weights are stored", LEAVE)
    if strategy not in ("group", "channel", "tensor"):
        keys.problem("strategy", f"{strategy!r}", "group, channel or tensor", LEAVE)
    elif strategy == "group" and (size is None or size < 1):
        keys.problem("group_size", f"{size}", "a positive number for the strategy `group`")
    elif strategy != "group" and size is not None and size != -1:
        keys.problem("group_size", f"{size}", f"null for the strategy `{strategy}`")
    order = keys.block.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        keys.problem("actorder", f"{order!r}", "null, weight or group")
    if keys.problems:
        return None
    group_size = {"group": size, "channel": -1, "tensor": None}[strategy]
    return Stated(bits, group_size, sym, desc_act=order in (True, "group", "dynamic"))


def _preset(name: str) -> Stated | None:
    """Return the scheme that the tool knows by a name, of those that are weight-only integers."""
    found = re.fullmatch(r"W([2-8])A16|W4A16_ASYM", name.upper())
    return Stated(int(found[1] or 4), 128, sym=found[1] is not None) if found else None


def _groups(keys: Keys, default: str | None) -> list[tuple[list[str], Stated]]:
    """Read `config_groups`: targets and the scheme of each; `default` is the model's `format`."""
    found = []
    for name, group in keys.get(dict, "config_groups", default={}).items():
        own = Keys(group if isinstance(group, dict) else None, f"{keys.where}.config_groups.{name}")
        if isinstance(group, list) and (preset := _preset(name)) is not None:
            found.append(([str(target) for target in group], preset))
            continue
        if not isinstance(group, dict):
            keys.problem(f"config_groups.{name}", f"{group!r}", "an object with targets, weights")
            continue
        targets = own.get(list, "targets", default=[])
        if not targets or not all(isinstance(target, str) for target in targets):
            own.problem("targets", f"{targets!r}", "a list of names")
        if len(targets) == 1 and str(targets[0]).endswith("Attention"):
            continue  # quantized attention: nothing of it is in the weights
        packed = own.get(str, "format", default=default)
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                own.problem(key, "quantized activations", "null: weights only", LEAVE)
        if packed not in (None, "pack-quantized"):
            what = OTHERS.get(packed, "an unknown packing")
            own.problem("format", f"{packed!r} ({what})", "'pack-quantized'", LEAVE)
        weights = own.get(dict, "weights")
        if weights is None and not own.problems:
            own.problem("weights", "null", "how the weights are quantized")
        if weights is not None and packed in (None, "pack-quantized"):
            inner = Keys(weights, f"{own.where}.weights")
            stated = _weights(inner)
            own.problems += inner.problems
            if stated is not None:
                found.append((targets, stated))
        keys.problems += own.problems
    return found


def _refuse_rest(keys: Keys) -> None:
    """Refuse keys beside the schemes that change what the weights mean."""
    status = keys.get(str, "quantization_status", default="compressed")
    if status not in ("compressed", "frozen"):
        keys.problem("quantization_status", f"{status!r}", "'compressed'")
    if keys.get(dict, "transform_config", default={}):
        keys.problem(
            "transform_config",
            "transforms of activations",
            "none: without them the weights mean something else",
            LEAVE,
        )
    sparse = keys.get(dict, "sparsity_config", default={})
    if sparse and sparse.get("format") != "dense":
        keys.problem("sparsity_config", f"{sparse.get('format')!r}", "weights stored whole", LEAVE)
    if keys.block.get("moe_sparsity_config") is not None:
        keys.problem("moe_sparsity_config", "pruned or replaced experts", "null", LEAVE)


def parse(block: Block | None) -> Claim:
    """Judge the config."""
    keys = Keys(block)
    method = keys.get(str, "quant_method", default="compressed-tensors")
    if method.lower() != "compressed-tensors":
        keys.problem("quant_method", f"{method!r}", "'compressed-tensors'")
    packed = keys.get(str, "format")
    if packed is not None and packed not in ("pack-quantized", "mixed-precision"):
        what = OTHERS.get(packed, "an unknown packing")
        keys.problem("format", f"{packed!r} ({what})", "'pack-quantized'", LEAVE)
    groups = _groups(keys, None if packed == "mixed-precision" else packed)
    ignore = keys.get(list, "ignore", default=[])
    if not all(isinstance(entry, str) for entry in ignore):
        keys.problem("ignore", f"{ignore}", "a list of names")
    kv_scheme = keys.get(dict, "kv_cache_scheme")
    if kv_scheme is not None and not isinstance(kv_scheme.get("num_bits"), int):
        keys.problem("kv_cache_scheme", f"{kv_scheme}", "an object with num_bits, or null")
    _refuse_rest(keys)
    if not groups and not keys.problems:
        keys.problem("config_groups", "no group with weights", "what is quantized, and how")
    raise_all(keys.problems)
    schemes = {target: stated for targets, stated in groups for target in targets}
    where = f"{keys.where}.config_groups"
    find = finder(schemes, where)

    def overrides(module: str) -> Stated | None:
        target = find(module)
        return schemes[target] if target is not None else None

    return Claim(
        format="compressed-tensors",
        base=next(iter(schemes.values())),
        overrides=overrides,
        skip=finder(ignore, f"{keys.where}.ignore"),
        producer=_producer(keys.block),
        block=keys.block,
        details={"kv_scheme": kv_scheme or {}},
    )


def _producer(block: Block) -> str:
    """Return the release that wrote the file, e.g. `compressed-tensors:0.20.0`."""
    version = block.get("version")
    return f"compressed-tensors:{version}" if isinstance(version, str) else ""
