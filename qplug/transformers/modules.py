"""Which module of a model takes which linear of a checkpoint: decided, and checked, before a swap.

Headers decide what is quantized, names go through the loader's own renaming, and everything that
does not fit is one error. Afterwards it would be too late: Transformers fills what it misses with
uninitialized memory or random numbers, and says so only in a report in the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qplug_converters import formats
from qplug_converters.errors import QplugError, Unsupported, raise_all
from qplug_converters.format import Format
from qplug_converters.layout import FLOATS, TensorSpec
from qplug_converters.scheme import ModelScheme, Scheme
from qplug_converters.shards import Shards
from qplug_converters.survey import survey

from . import compat
from .linear import buffer_name
from .names import Names, Parts
from .renaming import TableRenaming

ANY_FLOAT = (*FLOATS, "F64", "F8_E4M3", "F8_E5M2")

ROLES = {
    "gate_proj": "gate", "w1": "gate",
    "up_proj": "up", "w3": "up",
    "down_proj": "down", "w2": "down",
}  # fmt: skip
"""What checkpoints call the three linears of an expert."""

_EXPERT = re.compile(r"^(?P<owner>.+)\.(?P<number>\d+)\.(?P<name>\w+)$")


@dataclass(frozen=True, slots=True)
class Swap:
    """A linear of the checkpoint and the path in the model it is loaded at.

    `owner`, `number` and `role` are set for one linear of an expert, whose model class holds all
    experts fused.
    """

    stem: str
    path: str
    scheme: Scheme
    bias: bool
    owner: str = ""
    number: int = 0
    role: str = ""


def read_model(block: Mapping[str, Any], shards: Shards) -> tuple[Format, ModelScheme]:
    """Read what the checkpoint says: the same function as `qplug inspect` uses.

    Raises
    ------
    QplugError
        If it is of no known format, damaged, or its config contradicts its tensors.
    """
    known = next((f for f in formats.FORMATS if f.read and f.claims(block, shards.headers)), None)
    if known is None or known.read is None:
        raise Unsupported(
            f"quant_method {block.get('quant_method')!r}",
            "quantization_config",
            f"one of {', '.join(f.name for f in formats.FORMATS if f.read)}",
        )
    raise_all(shards.problems)
    return known, survey(shards, known, known.read(block, shards.headers, shards.peek))


def plan_swaps(
    model: Any, known: Format, linears: Mapping[str, Scheme], headers: Mapping[str, TensorSpec]
) -> tuple[list[Swap], dict[str, str]]:
    """Find the module for every quantized linear, and check everything about it.

    Returned with the table of a `TableRenaming`: names that no buffer can have.

    Linears that the model has no place for are left to the loader, which reports them as
    unexpected: a model without a head is loaded from a checkpoint with one.

    Raises
    ------
    QplugError
        All problems at once, the first being the error.
    """
    names, parts = Names(model), Parts(known, linears)
    tied = compat.tied_names(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    problems = _orphans(headers, parts, names)
    broken = {names.module(problem.where.rpartition(".")[0]) for problem in problems}
    swaps: list[Swap] = []
    for stem, scheme in linears.items():
        path = names.module(stem)
        if f"{path}.weight" in names.known:
            wrong = _check(modules[path], path, stem, scheme, headers, tied)
            problems += wrong
            if wrong:
                broken.add(path)
            else:
                swaps.append(Swap(stem, path, scheme, f"{stem}.bias" in headers))
        else:
            expert = _expert(stem, path, scheme, names, modules, problems)
            swaps += [expert] if expert else []
    problems += _half_experts(swaps, modules)
    table = parts.renamed({swap.stem: swap.path for swap in swaps}, names)
    plain = {key: spec for key, spec in headers.items() if key not in parts.keys}
    problems += _not_where_expected(swaps, parts, table, headers, names)
    problems += _misfits(plain, names)
    problems += _missing(model, swaps, plain, names, tied, broken)
    raise_all(problems)
    return swaps, table


def _orphans(headers: Mapping[str, TensorSpec], parts: Parts, names: Names) -> list[QplugError]:
    """Find parts of a quantized linear whose codes are missing."""
    found: dict[str, list[str]] = {}
    for key in headers:
        stem, _, part = key.rpartition(".")
        if part in parts.own and stem not in parts.layouts and names.of(key)[0] not in names.known:
            found.setdefault(stem, []).append(part)
    return [
        QplugError(
            "no such tensor", f"{stem}.{parts.codes}", f"codes beside {', '.join(others)}",
            "the checkpoint is incomplete",
        )
        for stem, others in found.items()
    ]  # fmt: skip


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a module that a quantized linear can stand in for, or `None`."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.out_features, module.in_features
    if compat.is_conv1d(module):
        inp, out = module.weight.shape  # type: ignore[misc]
        return int(out), int(inp)
    return None


def _check(
    module: nn.Module,
    path: str,
    stem: str,
    scheme: Scheme,
    headers: Mapping[str, TensorSpec],
    tied: set[str],
) -> list[QplugError]:
    size = linear_size(module)
    if size is None:
        return [
            QplugError(f"a quantized {type(module).__name__}", path, "a linear layer",
                       "this version loads quantized linears only")
        ]  # fmt: skip
    if f"{path}.weight" in tied:
        return [
            QplugError("a quantized head", stem, "none: the config ties it to the embeddings",
                       "set tie_word_embeddings to false in config.json")
        ]  # fmt: skip
    problems = []
    if size != (scheme.out_features, scheme.in_features):
        problems.append(
            QplugError(
                f"a weight of {scheme.out_features} x {scheme.in_features}",
                stem,
                f"{size[0]} x {size[1]}, as config.json makes {path}",
                "config.json and the tensors must be of the same model",
            )
        )
    spec = headers.get(f"{stem}.bias")  # one that the model has is checked with its other tensors
    if spec is not None and (spec.shape != (scheme.out_features,) or spec.dtype not in FLOATS):
        expected = f"[{scheme.out_features}] in {', '.join(FLOATS)}"
        if getattr(module, "bias", None) is None:
            problems.append(QplugError(str(spec), f"{stem}.bias", expected))
    return problems


def _expert(
    stem: str,
    path: str,
    scheme: Scheme,
    names: Names,
    modules: Mapping[str, nn.Module],
    problems: list[QplugError],
) -> Swap | None:
    """Find the fused experts that a linear `<owner>.<number>.<role>` belongs to."""
    match = _EXPERT.match(path)
    if match is None or match["name"] not in ROLES:
        return None
    prefix = f"{names.prefix}."
    owners = (match["owner"], prefix + match["owner"], match["owner"].removeprefix(prefix))
    owner = next((o for o in owners if hasattr(modules.get(o), "gate_up_proj")), None)
    if owner is None:
        return None
    module: Any = modules[owner]
    number, role = int(match["number"]), ROLES[match["name"]]
    plain = (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
        and hasattr(module, "_apply_gate")
    )
    if not plain:
        problems.append(
            Unsupported(f"quantized experts of {type(module).__name__}", owner,
                        "experts with gate, up and down linears and no bias")
        )  # fmt: skip
        return None
    experts, twice, hidden = module.gate_up_proj.shape
    want = (hidden, twice // 2) if role == "down" else (twice // 2, hidden)
    if (scheme.out_features, scheme.in_features) != want or number >= experts:
        problems.append(
            QplugError(
                f"expert {number} of {scheme.out_features} x {scheme.in_features}", stem,
                f"{experts} experts of {want[0]} x {want[1]}, as config.json makes {owner}",
            )
        )  # fmt: skip
        return None
    return Swap(stem, f"{owner}.{number}.{match['name']}", scheme, False, owner, number, role)


def _half_experts(swaps: list[Swap], modules: Mapping[str, nn.Module]) -> list[QplugError]:
    """Refuse fused experts of which only some are quantized."""
    found: dict[str, set[tuple[int, str]]] = {}
    for swap in swaps:
        if swap.owner:
            found.setdefault(swap.owner, set()).add((swap.number, swap.role))
    problems = []
    for owner, have in found.items():
        module: Any = modules[owner]
        count = module.gate_up_proj.shape[0]
        want = {(n, role) for n in range(count) for role in ("gate", "up", "down")}
        for number, role in sorted(want - have)[:1]:
            problems.append(
                QplugError(f"{len(have)} quantized linears", owner,
                           f"{len(want)}; the {role} of expert {number} is missing")
            )  # fmt: skip
    return problems


def _not_where_expected(
    swaps: list[Swap],
    parts: Parts,
    table: Mapping[str, str],
    headers: Mapping[str, TensorSpec],
    names: Names,
) -> list[QplugError]:
    """Ask the loader where each stored tensor will go once the modules are swapped."""
    stored = {
        f"{swap.stem}.{part}": f"{swap.path}.{buffer_name(part)}"
        for swap in swaps
        for part in (*parts.of(swap.stem), "bias")
        if f"{swap.stem}.{part}" in headers
    }
    after = names.known | dict.fromkeys(stored.values(), True)
    renaming = TableRenaming(table)
    problems: list[QplugError] = []
    for key, wanted in stored.items():
        name, pattern = names.of(key, after, renaming)
        if name != wanted or pattern is not None:
            problems.append(
                Unsupported(f"Transformers loads it as {name}", key, wanted,
                            "its renaming rules for this model do not fit quantized tensors")
            )  # fmt: skip
    return problems


def _misfits(headers: Mapping[str, TensorSpec], names: Names) -> list[QplugError]:
    """Find unquantized tensors of the wrong shape or kind.

    The loader checks no shapes where a quantizer is present, and casts whatever it is given.
    """
    problems = []
    for key, spec in headers.items():
        name, pattern = names.of(key)
        wanted = names.known.get(name) if pattern is None else None
        if wanted is None:
            continue
        shape = tuple(wanted.shape)
        if spec.shape != shape or (wanted.is_floating_point() and spec.dtype not in ANY_FLOAT):
            kind = "floating-point" if wanted.is_floating_point() else "whole"
            problems.append(
                QplugError(str(spec), key, f"{list(shape)} {kind} numbers, as config.json says")
            )
    return problems


def _missing(
    model: Any,
    swaps: list[Swap],
    headers: Mapping[str, TensorSpec],
    names: Names,
    tied: set[str],
    told: set[str],
) -> list[QplugError]:
    """Find parameters of the base model that the checkpoint has nothing for.

    What lies outside it may be new, such as the head of a classifier that is trained on a
    quantized base; so may a pooler inside it. `told` are modules whose problem is known already.
    """
    filled = names.filled(headers) | tied
    for swap in swaps:
        filled.add(f"{swap.path}.weight")
        if swap.owner:
            filled |= {f"{swap.owner}.gate_up_proj", f"{swap.owner}.down_proj"}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    base = getattr(model, names.prefix or "?", model)
    start = f"{names.prefix}." if base is not model else ""
    lost: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.startswith(start) and name not in filled:
            lost.setdefault(name.removeprefix(start).partition(".")[0], []).append(name)
    problems = []
    for child, found in lost.items():
        module = base.get_submodule(child) if child in dict(base.named_children()) else None
        if module is not None and len(found) == len(list(module.parameters())) and _pools(module):
            continue
        problems += [
            QplugError("no such tensor", name, str(list(names.known[name].shape)),
                       "the checkpoint is incomplete, or of another model")
            for name in found
            if name.rpartition(".")[0] not in told
            and not any(pattern.search(name) for pattern in ignored)
        ]  # fmt: skip
    return problems


def _pools(module: nn.Module) -> bool:
    """Whether this is a small module of linears, no stack of layers and no embedding."""
    parts = list(module.modules())
    return any(isinstance(part, nn.Linear) for part in parts) and not any(
        isinstance(part, nn.ModuleList) for part in parts
    )
