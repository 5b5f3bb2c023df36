"""Properties of checkpoints that rules ask for, and what a config can truly state instead.

A property is `facts -> sentence`, or `None` where a checkpoint has it not; a repair is
`facts -> keys`, or `None` where no true statement helps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qplug_converters import formats
from qplug_converters.block import stated_group_size
from qplug_converters.route import ROW_PARALLEL
from qplug_converters.scheme import ModelScheme

from .facts import SIDE, Facts, half_fused, layer_of
from .reading import as_read, everything_stated
from .rules import Repair

Property = Callable[[Facts], str | None]

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Group sizes that the config check lets through (`MARLIN_SUPPORTED_GROUP_SIZES`)."""
GPTQ_TYPES = ((4, True), (8, True))
"""Bits and `sym` that the GPTQ config takes (`AutoGPTQConfig.TYPE_MAP`)."""
CPU_STEP = 32
"""What in and out features must be multiples of (`CPUWNA16LinearKernel`)."""


def always(facts: Facts) -> str:
    """Every checkpoint has it."""
    if facts.kv_scales:
        return "its scales of the KV cache are not used"
    return ""


def in_side_file(facts: Facts) -> str | None:
    """Whether config.json holds no block."""
    if facts.place != SIDE:
        return None
    return "config.json has no quantization_config: the model is taken for unquantized"


def without_method(facts: Facts) -> str | None:
    """Whether the block does not name its method."""
    if facts.block.get("quant_method"):
        return None
    return "the config has no quant_method: the model is taken for unquantized"


def state_method(facts: Facts) -> dict[str, Any]:
    """State the method as the format does."""
    return {"quant_method": _written(facts).get("quant_method")}


def _written(facts: Facts) -> Mapping[str, Any]:
    """Return the block that the format itself would write; nothing without linears."""
    if not facts.linears:
        return {}
    model = ModelScheme(facts.format, facts.linears, facts.dense)
    return formats.find(facts.format).write(model).block or {}


def _lacking(facts: Facts, keys: tuple[str, ...]) -> list[str]:
    """Return those of `keys` (or `key|alias`) that are not in the block."""
    block = facts.block
    return [
        names.partition("|")[0]
        for names in keys
        if all(block.get(name) is None for name in names.split("|"))
    ]


def missing_key(*keys: str) -> Property:
    """Return the property that one of `keys` (or `key|alias`) is not in the block."""

    def met(facts: Facts) -> str | None:
        lacking = _lacking(facts, keys)
        return f"the config has no {' and no '.join(lacking)}" if lacking else None

    return met


def state_missing(*keys: str) -> Repair:
    """Return the repair that states those of `keys` that are missing, as the format does."""

    def repair(facts: Facts) -> dict[str, Any] | None:
        written, lacking = _written(facts), _lacking(facts, keys)
        if not all(key in written for key in lacking) or _mixed(facts):
            return None
        if "sym" in lacking and any(s.zeros is None for s in facts.linears.values()):
            return None
        return {key: written[key] for key in lacking}

    return repair


def _mixed(facts: Facts) -> bool:
    """Whether linears differ, so that one base number cannot be read off them."""
    kinds = {(s.bits, s.symmetric, s.act_order) for s in facts.linears.values()}
    return len(kinds) > 1


def flagged_order(facts: Facts) -> str | None:
    """Whether the config claims act order for groups (`normalize_and_validate_gptq_desc_act`)."""
    if not any(s.desc_act and s.group_size != -1 for s in everything_stated(facts)):
        return None
    if not facts.linears:
        return "desc_act is true"
    if any(s.act_order for s in facts.linears.values()):
        return "the columns are in act order"
    return "desc_act is true, and the flag decides, though g_idx is in order"


def state_order(facts: Facts) -> dict[str, Any] | None:
    """State that there is no act order, where that is so."""
    if not facts.linears or any(s.act_order for s in facts.linears.values()):
        return None
    return _everywhere(facts, "desc_act", False)


def _everywhere(facts: Facts, key: str, value: bool) -> dict[str, Any]:
    """Return the changes that state `key` at the top and wherever `dynamic` states it."""
    changes: dict[str, Any] = {key: value}
    dynamic = facts.block.get("dynamic")
    if isinstance(dynamic, Mapping):
        changes["dynamic"] = {
            text: {**v, key: value} if isinstance(v, Mapping) and key in v else v
            for text, v in dynamic.items()
        }
    return changes


def any_order(facts: Facts) -> str | None:
    """Whether desc_act is true anywhere, of one group too."""
    return "desc_act is true" if any(s.desc_act for s in everything_stated(facts)) else None


def one_group(facts: Facts) -> str | None:
    """Whether the config states one group per row."""
    return "group size -1" if any(s.group_size == -1 for s in everything_stated(facts)) else None


def asymmetric_v1(facts: Facts) -> str | None:
    """Whether GPTQ zeros are stored minus one and not all the midpoint."""
    if facts.format != "gptq" or all(s.sym for s in everything_stated(facts)):
        return None
    return "zeros are stored minus one, and it takes them as they are"


def asymmetric(facts: Facts) -> str | None:
    """Whether the config says asymmetric."""
    return None if all(s.sym for s in everything_stated(facts)) else "asymmetric"


def odd_bits(facts: Facts) -> str | None:
    """Whether anything is neither 4 nor 8 bits."""
    bits = {scheme.bits for scheme in facts.linears.values()}
    bits = bits or {s.bits for s in everything_stated(facts) if isinstance(s.bits, int)}
    other = sorted(bits - {4, 8})
    return f"{other[0]} bits: humming's kernels may take them" if other else None


def hidden_order(facts: Facts) -> str | None:
    """Whether there is act order that the config denies."""
    for _, stated, scheme in as_read(facts):
        if scheme.act_order and not (stated.desc_act and stated.group_size != -1):
            return "the columns are in act order, desc_act denies it, and g_idx is never read"
    return None


def other_type(facts: Facts) -> str | None:
    """Whether bits and `sym` are none that the GPTQ config takes."""
    for stated in everything_stated(facts):
        if (stated.bits, bool(stated.sym)) not in GPTQ_TYPES:
            sym = "symmetric" if stated.sym else "asymmetric"
            symmetric = facts.linears and all(s.symmetric for s in facts.linears.values())
            told = ", says the config, and every zero is the midpoint" if symmetric else ""
            told = "" if stated.sym else told
            return f"{stated.bits}-bit {sym}{told}: GPTQ is taken as 4 or 8 bits, symmetric"
    return None


def state_symmetry(facts: Facts) -> dict[str, Any] | None:
    """State that zeros are symmetric, where every one was seen to be the midpoint."""
    linears = facts.linears.values()
    if not linears or not all(s.zeros is not None and s.zeros.symmetric for s in linears):
        return None
    return _everywhere(facts, "sym", True)


def hidden_zeros(facts: Facts) -> str | None:
    """Whether zeros differ from the midpoint although the config says symmetric."""
    for module, stated, scheme in as_read(facts):
        if stated.sym and scheme.zeros is not None and not scheme.zeros.symmetric:
            return f"sym is true, zeros of {module} are others, and they are never read"
    return None


def other_group(facts: Facts) -> str | None:
    """Whether a stated group size is none that Marlin takes."""
    for stated in everything_stated(facts):
        if stated.group_size not in MARLIN_GROUPS:
            return f"group size {stated.group_size}: taken are {_listed(MARLIN_GROUPS)}"
    return None


def state_groups(facts: Facts) -> dict[str, Any] | None:
    """State -1 where every linear is one group, whatever number the config has."""
    if "dynamic" in facts.block or not facts.linears:
        return None
    return {"group_size": -1} if all(s.groups == 1 for s in facts.linears.values()) else None


def cut_group(facts: Facts) -> str | None:
    """Whether groups do not divide the inputs."""
    for module, scheme in facts.schemes():
        if scheme.in_features % scheme.group_size:
            return f"{scheme.in_features} inputs of {module} are no whole groups"
    return None


def other_reading(facts: Facts) -> str | None:
    """Whether vLLM expects other shapes than the tensors have."""
    for module, stated, scheme in as_read(facts):
        size = scheme.in_features if stated.group_size == -1 else stated.group_size
        if (stated.bits, size) != (scheme.bits, scheme.group_size):
            layer = layer_of(facts, module)
            said = f"{stated.bits}-bit g{stated.group_size}"
            return f"it reads {said} for {layer} out of the config, and {module} has other shapes"
    return None


def half_quantized(facts: Facts) -> str | None:
    """Whether a fused layer has dense and quantized parts."""
    found = half_fused(facts)
    return f"{found[0]} is dense and {found[1]} not: one layer" if found else None


def ragged_head(facts: Facts) -> str | None:
    """Whether a quantized head has a vocabulary that is no multiple of 64."""
    for module, scheme in facts.linears.items():
        if module.rpartition(".")[2] == "lm_head" and scheme.out_features % 64:
            return f"a quantized {module} with {scheme.out_features} rows, no multiple of 64"
    return None


def unknown_names(facts: Facts) -> str | None:
    """Whether experts have names that vLLM's Mixtral does not know."""
    if facts.architecture != "MixtralForCausalLM":
        return None
    new = next((name for name in facts.linears if ".mlp.experts." in name), None)
    return f"{new}: its Mixtral knows block_sparse_moe.experts" if new else None


def experts(facts: Facts) -> str | None:
    """Whether linears of experts are quantized."""
    return "quantized experts" if any("experts" in m.split(".") for m in facts.linears) else None


def guessed_list(facts: Facts) -> str | None:
    """Whether vLLM guesses which modules are dense, and KV scales mislead it."""
    if facts.block.get("modules_to_not_convert") or not facts.kv_scales:
        return None
    return "modules_to_not_convert is empty, and scales of the KV cache mislead its guess"


def state_list(facts: Facts) -> dict[str, Any] | None:
    """State the list of dense modules."""
    written = _written(facts).get("modules_to_not_convert")
    return {"modules_to_not_convert": written} if written else None


def skipped(facts: Facts) -> str | None:
    """Whether an entry of the list of dense modules also names a quantized one."""
    entries = facts.block.get("modules_to_not_convert") or []
    for entry in entries if isinstance(entries, list) else []:
        for module in facts.linears:
            if str(entry) in module:
                return f"modules_to_not_convert has {entry!r}, which is also found in {module}"
    return None


def _awq_group(facts: Facts) -> Any:
    """Return the group size that vLLM reads in an AWQ config; its own name counts first."""
    return facts.block.get("q_group_size", facts.block.get("group_size"))


def other_awq_group(facts: Facts) -> str | None:
    """Whether only the slow AWQ kernels are left."""
    sizes = [_awq_group(facts)]
    # AutoRound's config may state others for some layers.
    sizes += [scheme.group_size for _, scheme in facts.schemes() if scheme.groups > 1]
    for size in sizes:
        if size not in MARLIN_GROUPS:
            return f"group size {size}: Marlin takes {_listed(MARLIN_GROUPS)}"
    return None


def other_awq_shapes(facts: Facts) -> str | None:
    """Whether the group size in the config is another than that of the tensors."""
    size = _awq_group(facts)
    for module, scheme in facts.schemes():
        if scheme.group_size != (scheme.in_features if size == -1 else size):
            return f"the config says group size {size}, and {module} has {scheme.group_size}"
    return None


def state_awq_group(facts: Facts) -> dict[str, Any] | None:
    """State the group size as the format does."""
    groups = stated_group_size(facts.linears.values(), ragged=False)
    stated = {groups(scheme) for scheme in facts.linears.values()}
    return {"group_size": stated.pop()} if len(stated) == 1 else None


def eight_bits(facts: Facts) -> str | None:
    """Whether anything is not 4 bits."""
    found = next((s.bits for s in facts.linears.values() if s.bits != 4), None)
    if found is None and not facts.linears:
        found = next((s.bits for s in everything_stated(facts) if s.bits != 4), None)
    return f"{found} bits: its CPU kernels take 4" if found is not None else None


def odd_sizes(facts: Facts) -> str | None:
    """Whether the CPU kernel cannot cut a linear."""
    for module, scheme in facts.linears.items():
        inputs, outputs = scheme.in_features, scheme.out_features
        if ROW_PARALLEL.search(module):
            inputs //= facts.ranks
        else:
            outputs //= facts.ranks
        if inputs % CPU_STEP or outputs % CPU_STEP:
            each = f" on each of {facts.ranks} ranks" if facts.ranks > 1 else ""
            return f"{module} is {outputs} x {inputs}{each}, no multiples of {CPU_STEP}"
    return None


def odd_groups(facts: Facts) -> str | None:
    """Whether a group has an odd number of inputs."""
    size = _awq_group(facts)
    odd = isinstance(size, int) and size != -1 and size % 2
    return f"group size {size} is odd" if odd else None


def _listed(items: tuple[int, ...]) -> str:
    return ", ".join(map(str, items))


# bitsandbytes ------------------------------------------------------------------------------------


def transposed_absmax(facts: Facts) -> str | None:
    """Whether absmax has the shape that bitsandbytes saves after a forward on a CPU."""
    books = (scheme.codebook for scheme in facts.linears.values())
    if not any(book is not None and book.transposed for book in books):
        return None
    return "absmax was saved after a forward on a CPU, and is read as something else"


def mixed_tables(facts: Facts) -> str | None:
    """Whether linears have tables other than that which the config names."""
    names = {s.codebook.name for s in facts.linears.values() if s.codebook is not None}
    return f"{' and '.join(sorted(names))} in one file" if len(names) > 1 else None
