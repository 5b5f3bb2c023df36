"""Reading a quantization config block and headers: typed keys, aliases, every problem collected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .errors import QplugError
from .format import Block, Headers
from .layout import TensorSpec
from .scheme import Scheme


class Keys:
    """Typed access to one block; problems are collected, not raised."""

    def __init__(self, block: Block | None, where: str = "quantization_config") -> None:
        self.block: Block = block or {}
        self.where = where
        self.problems: list[QplugError] = []

    def get(self, kind: type, *names: str, default: Any = None) -> Any:
        """Return the first of `names` that is present and not null, checked to be a `kind`.

        Two aliases with different values, and a value of another type (`"4"` for 4, `"false"` for
        false), are problems: readers take them in different ways.
        """
        found = {n: self.block[n] for n in names if self.block.get(n) is not None}
        for name, value in found.items():
            if type(value) is not kind:
                self.problem(name, f"{value!r}", f"a JSON {_JSON[kind]}")
                return default
        if len({repr(v) for v in found.values()}) > 1:
            self.problem(
                " and ".join(found),
                " and ".join(repr(v) for v in found.values()),
                "one value",
                "remove the wrong one",
            )
        return next(iter(found.values()), default)

    def problem(
        self, key: str, found: str, expected: str = "", fix: str = "correct the config"
    ) -> None:
        """Remember that `key` is wrong."""
        self.problems.append(QplugError(found, f"{self.where}.{key}", expected, fix))


_JSON = {int: "integer", bool: "true or false", str: "string", dict: "object", list: "list"}


INCOMPLETE = "the file is damaged or not whole: download it again"
"""What to do about a tensor that is missing or of the wrong kind."""


def modules_with(headers: Headers, *parts: str) -> list[str]:
    """Return the modules that have a tensor `<module>.<part>` of any of `parts`, in file order."""
    split = (name.rpartition(".") for name in headers)
    return list(dict.fromkeys(module for module, dot, part in split if dot and part in parts))


def stored_as(headers: Headers) -> tuple[str, ...]:
    """Return what the shapes of the first `qweight` can be, the likeliest first.

    `gptq`, `gemm`, `gemv`, `gemv_fast`, `llm-awq`; several where a file of one would be a file of
    the other with groups of 8 inputs (GPTQ) or of one (AWQ GEMM), which nobody writes.
    """
    for module in modules_with(headers, "qweight"):
        names = ("qweight", "scales", "qzeros", "scaled_zeros", "g_idx")
        found = parts_of(headers, module, names)
        codes, scales = found["qweight"], found.get("scales")
        if scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
            continue
        if codes.dtype == "I16":
            return ("llm-awq",) if "scaled_zeros" in found else ("gemv_fast",)
        (rows, words), (groups, width) = codes.shape, scales.shape
        kinds = []
        zeros = found["qzeros"].shape if "qzeros" in found else ()
        fits = width == 8 * zeros[1] if len(zeros) == 2 else width % 8 == 0
        if groups == rows and fits and "g_idx" not in found:
            kinds.append("gemv")
        if width == words:
            kinds.append("gptq")
        if width == 8 * words:
            kinds.append("gemm")
        return tuple(kinds)
    return ()


def parts_of(headers: Headers, module: str, names: Iterable[str]) -> dict[str, TensorSpec]:
    """Return those of the named parts that `module` has."""
    return {n: headers[f"{module}.{n}"] for n in names if f"{module}.{n}" in headers}


def dense_modules(headers: Headers) -> tuple[str, ...]:
    """Return the modules with a 2-D `weight`: linears left in full precision, and embeddings."""
    return tuple(
        name.removesuffix(".weight")
        for name, spec in headers.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    )


_EMBEDDING = re.compile(r"(^|\.)(embed|wte|wpe|word_embed|position_embed|tok_embed|shared$)")


def dense_linears(dense: Iterable[str]) -> tuple[str, ...]:
    """Return the dense modules that are not embeddings, judged by the names in use."""
    return tuple(name for name in dense if not _EMBEDDING.search(name))


def stated_group_size(schemes: Iterable[Scheme], *, ragged: bool) -> Callable[[Scheme], int]:
    """Return the group size a config states for each scheme, with as few exceptions as possible.

    A linear with one group may be said to have any group size from its in_features up, or -1: it
    takes the most common size of the linears with several groups. Where no linear has several,
    the common in_features is stated, or -1 if they differ. Where groups may not be `ragged`, no
    size larger than in_features is stated.
    """
    schemes = list(schemes)
    several = Counter(s.group_size for s in schemes if s.groups > 1)
    if several:
        base = several.most_common(1)[0][0]
    else:
        widths = {s.in_features for s in schemes}
        base = widths.pop() if len(widths) == 1 else -1

    def stated(scheme: Scheme) -> int:
        if scheme.groups > 1:
            return scheme.group_size
        fits = base >= scheme.in_features if ragged else base == scheme.in_features
        return base if fits else -1

    return stated


def some(modules: Sequence[str]) -> str:
    """Return the first module, and how many more there are."""
    return modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
