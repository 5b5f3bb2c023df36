"""Which modules a config means: names, classes, and regular expressions with a time limit.

Expressions come from an untrusted file: the `regex` package matches as `re` does, and takes a time
limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .block import dense_linears
from .errors import QplugError

MATCH_SECONDS = 1.0
"""Time limit for one pattern and one name; real ones take microseconds."""


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

    def matches(name: str) -> bool:
        try:
            return search(name, timeout=MATCH_SECONDS) is not None
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
