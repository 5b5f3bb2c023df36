"""Which modules a config means: names, classes, and regular expressions with a time limit.

Expressions come from an untrusted file: the `regex` package matches as `re` does, and takes a time
limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .block import Keys, dense_linears
from .errors import QplugError

MATCH_SECONDS = 1.0
"""Time limit for one pattern and one name; real ones take microseconds."""
ALL_SECONDS = 5.0
"""Time limit for one pattern and all names."""


def matcher(text: str, where: str, *, anywhere: bool = False) -> Callable[[str], bool]:
    """Return `name -> whether the pattern matches at its beginning`, as `re.match` does.

    With `anywhere`, as `re.search` does.

    Raises
    ------
    QplugError
        If `text` is no regular expression; and, when called, if matching takes too long.
    """
    import regex

    try:
        pattern = regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise QplugError(
            f"{text!r}: {error}", where, "a regular expression", "correct the config"
        ) from None

    search = pattern.search if anywhere else pattern.match
    spent = 0.0

    def matches(name: str) -> bool:
        nonlocal spent
        started = time.perf_counter()
        try:
            hit = search(name, timeout=MATCH_SECONDS) is not None
            spent += time.perf_counter() - started
            if spent > ALL_SECONDS:
                raise TimeoutError
            return hit
        except TimeoutError:
            raise QplugError(
                f"a pattern of {len(text)} characters that does not come to an end",
                where,
                "regular expressions of module names",
                "correct the config",
            ) from None

    return matches


def flat(value: object) -> list[str]:
    """Return the names in a list, a list of lists, or a text with commas between them."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list):
        return [name for item in value for name in flat(item)]
    return []


def first_rule(
    keys: Keys, dynamic: Mapping[str, Any]
) -> Callable[[str], tuple[str, Mapping[str, Any] | None] | None]:
    """Compile `dynamic`: module -> the rule and its overrides, `None` for full precision."""
    rules = []
    for text, values in dynamic.items():
        skip = text.startswith("-:")
        try:
            matches = matcher(text.removeprefix("-:").removeprefix("+:"), f"{keys.where}.dynamic")
        except QplugError as error:
            reason = error.found.partition(": ")[2]
            keys.problem("dynamic", f"{text!r}: {reason}", "a regular expression")
            continue
        if not skip and not isinstance(values, Mapping):
            keys.problem("dynamic", f"{values!r} for {text!r}", "an object of overrides")
            continue
        rules.append((text, matches, None if skip else values))

    def first_of(module: str) -> tuple[str, Mapping[str, Any] | None] | None:
        return next(((text, values) for text, hit, values in rules if hit(module)), None)

    return first_of


LISTS = ("modules_in_block_to_quantize", "block_name_to_quantize", "modules_to_not_convert")
"""Keys that list modules: a list that misses a quantized linear is a note, for tools disagree
about its names; the other ways to leave a module in full precision are contradictions."""


def listed(keys: Keys) -> Callable[[str], str | None]:
    """Compile the lists of modules: module -> the key that leaves it in full precision.

    An entry of `modules_in_block_to_quantize` is a part of a name (Optimum, vLLM), and an empty
    list says nothing. `modules_to_not_convert` holds parts of names too.
    """
    for key in (LISTS[0], LISTS[2]):
        value = keys.block.get(key)
        if value is not None and not isinstance(value, list):
            keys.problem(key, f"{value!r}", "a list of names")
    only = [name.removesuffix(".weight") for name in flat(keys.block.get(LISTS[0]))]
    never = flat(keys.block.get(LISTS[2]))

    def skip(module: str) -> str | None:
        if only and not any(name in module for name in only):
            return LISTS[0]
        return LISTS[2] if any(name in f"{module}." for name in never) else None

    return skip


CLASSES = {
    "Linear": ("Linear", "LinearBase", "Module"),
    "Embedding": ("Embedding", "VocabParallelEmbedding", "Module"),
}
"""Names of classes that a module may be targeted by: those of a linear, those of an embedding."""


def finder(targets: Iterable[str], where: str) -> Callable[[str], str | None]:
    """Return `module -> the target that matches it` (compressed-tensors 0.20 `match_targets`).

    A target is a module path, `re:` and an expression that matches from the beginning, or a class:
    a path counts before an expression before a class, and alphabetically within a kind.

    Raises
    ------
    QplugError
        If an expression is none.
    """
    names = set(targets)
    patterns = [
        (target, matcher(target.removeprefix("re:"), where))
        for target in sorted(names)
        if target.startswith("re:")
    ]
    classes = {kind: sorted(names & set(known)) for kind, known in CLASSES.items()}

    def find(module: str) -> str | None:
        if module in names:
            return module
        for target, matches in patterns:
            if matches(module):
                return target
        kind = "Linear" if dense_linears([module]) else "Embedding"
        return next(iter(classes[kind]), None)

    return find
