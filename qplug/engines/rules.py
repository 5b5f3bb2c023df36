"""Rules of engines as data, and the judge that goes through them version by version.

A rule says what an engine does from one version to another with a checkpoint of some property. Of
the rules that hold for a version, the first whose property a checkpoint has decides. Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Any

from .facts import Facts

Version = tuple[int, ...]
Repair = Callable[[Facts], Mapping[str, Any] | None]
"""Keys of the config block to state otherwise (`None`: to leave out), each truly; or no cure."""


class Outcome(Enum):
    """What happens to a checkpoint in an engine."""

    RUNS = "runs"
    REFUSED = "refused"
    WRONG = "silently wrong"
    UNTESTED = "not tested"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What an engine does with checkpoints of one property.

    Attributes
    ----------
    what
        The property, for the documentation.
    met
        `facts -> sentence` about this checkpoint, or `None` if it has not the property.
    outcome
        What happens then.
    since, until
        The first version, and the first that does otherwise; empty: those the table begins and
        ends with.
    source
        How this is known: `run` (with the engine), `read` (in its source), and where.
    repair
        What a config can state instead so that the rule no longer applies.
    """

    what: str
    met: Callable[[Facts], str | None]
    outcome: Outcome
    source: str
    since: str = ""
    until: str = ""
    repair: Repair | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine, alone or with an extension.

    Attributes
    ----------
    key, title
        What `--for` takes, and what tables say.
    first, last
        Versions that the rules were found in.
    rules
        Format -> rules; of another format nothing is claimed.
    command
        `(facts, folder) -> command or code` that works where the outcome is `RUNS`.
    stock
        Whether it is an engine as its project distributes it.
    """

    key: str
    title: str
    first: str
    last: str
    rules: Mapping[str, tuple[Rule, ...]]
    command: Callable[[Facts, str], str]
    stock: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine does with a checkpoint, in the versions from `first` to `last`."""

    engine: Engine
    first: str
    last: str
    outcome: Outcome
    why: str
    command: str
    rule: Rule

    @property
    def versions(self) -> str:
        """Return e.g. `0.22 to 0.29`."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    def as_json(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        return {
            "engine": self.engine.key,
            "first": self.first,
            "last": self.last,
            "outcome": self.outcome.value,
            "why": self.why,
            "command": self.command,
        }


def version(text: str) -> Version:
    """Return the first two numbers of a version.

    Raises
    ------
    ValueError
        If it does not start with them.
    """
    return tuple(int(part) for part in text.split(".")[:2])


def shown(at: Version) -> str:
    """Return e.g. `0.22`."""
    return ".".join(map(str, at))


def judge(engine: Engine, facts: Facts, folder: str = "DIR") -> tuple[Answer, ...]:
    """Return what every version of an engine does, versions that do the same taken together.

    Nothing for a format of which the engine's rules say nothing.
    """
    rules = engine.rules.get(facts.format, ())
    first, last = version(engine.first), version(engine.last)
    marks = {version(mark) for rule in rules for mark in (rule.since, rule.until) if mark}
    starts = [first, *sorted(m for m in marks if first < m <= last)]
    found: list[Answer] = []
    for start, stop in pairwise([*starts, (last[0], last[1] + 1)]):
        answer = _first(engine, rules, facts, start, folder)
        if answer is None:
            continue
        until = shown((stop[0], stop[1] - 1))
        same = found and (found[-1].rule, found[-1].why) == (answer.rule, answer.why)
        if same:
            found[-1] = replace(found[-1], last=until)
        else:
            found.append(replace(answer, first=shown(start), last=until))
    return tuple(found)


def judge_at(
    engine: Engine, facts: Facts, at: Version | None = None, folder: str = "DIR"
) -> Answer | None:
    """Return what one version (the last one) of an engine does; `None`: nothing is claimed."""
    rules = engine.rules.get(facts.format, ())
    return _first(engine, rules, facts, at or version(engine.last), folder)


def _first(
    engine: Engine, rules: tuple[Rule, ...], facts: Facts, at: Version, folder: str
) -> Answer | None:
    """Return the answer of the first rule that holds for a version and is met."""
    for rule in rules:
        early = rule.since and at < version(rule.since)
        late = rule.until and at >= version(rule.until)
        if early or late:
            continue
        why = rule.met(facts)
        if why is not None:
            runs = rule.outcome is Outcome.RUNS
            command = engine.command(facts, folder) if runs else ""
            return Answer(engine, shown(at), shown(at), rule.outcome, why, command, rule)
    return None


def repairs(
    engine: Engine, facts: Facts, at: Version | None = None
) -> tuple[Facts, dict[str, Any]] | None:
    """Return what a config must state otherwise for an engine to take the file as it is.

    Returns
    -------
    tuple or None
        The facts after it, and the keys with their values (`None`: to leave out); `None` if no
        statement that is true helps. Without keys, the block has to move to config.json.
    """
    lacking = (key for key in facts.whole if facts.block.get(key) is None)
    changes = {key: facts.whole[key] for key in lacking if facts.whole[key] is not None}
    facts = facts.stating(changes)
    done: set[str] = set()
    while (answer := judge_at(engine, facts, at)) is not None:
        if answer.outcome is Outcome.RUNS:
            return facts, changes
        rule = answer.rule
        new = rule.repair(facts) if rule.repair is not None and rule.what not in done else None
        if new is None:
            return None
        done.add(rule.what)
        changes |= new
        facts = facts.stating(new)
    return None
