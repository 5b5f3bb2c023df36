"""Finding the form of a checkpoint that a stock engine takes and that keeps every weight.

Plans over formats and wishes are judged by the engine's own rules (`engines`): first the file as it
is, then with a config that states the truth, then every exact conversion. Nothing here imports
torch, and no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from qplug_converters import formats
from qplug_converters.checkpoint import Checkpoint
from qplug_converters.errors import QplugError, Refused
from qplug_converters.format import Format
from qplug_converters.plan import Plan, Verdict, Wishes
from qplug_converters.route import ROW_PARALLEL
from qplug_converters.scheme import ModelScheme, Scheme

from .engines import (
    ENGINES,
    Answer,
    Engine,
    Facts,
    Outcome,
    Version,
    judge_at,
    of_checkpoint,
    of_converted,
    repairs,
)

SERVED = ("awq", "gptq_v2", "gptq")
"""Formats to convert to for serving through qplug, the better first where both are as exact."""
GROUP_SIZES = (128, 64, 32)
"""Sizes to which groups are split; what kernels have."""
SLACK = 1.1
"""A form that stays in the format of the source may be this much larger than the smallest."""

Planner = Callable[[ModelScheme, Format, Wishes], Plan]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to store the same weights, and what the engine does with it.

    `nbytes` are those of all tensors. `stated` are keys of the config that differ where tensors
    are copied (`None`: left out); `None` for what is not such a copy. `uneven` is why its linears
    do not split between the ranks asked for.
    """

    plan: Plan
    nbytes: int
    answer: Answer | None
    facts: Facts
    stated: Mapping[str, Any] | None = None
    uneven: str = ""

    @property
    def runs(self) -> bool:
        """Whether the engine takes it."""
        return self.outcome is Outcome.RUNS

    @property
    def outcome(self) -> Outcome | None:
        """What the engine does with it, on as many ranks as asked for; `None`: not known."""
        if self.answer is None:
            return None
        runs = self.answer.outcome is Outcome.RUNS
        return Outcome.REFUSED if runs and self.uneven else self.answer.outcome

    @property
    def why(self) -> str:
        """Why the engine does that."""
        if self.answer is None:
            return ""
        runs = self.answer.outcome is Outcome.RUNS
        return self.uneven if runs and self.uneven else self.answer.why

    @property
    def name(self) -> str:
        """Return e.g. `gptq 4-bit sym g32`."""
        schemes = dict.fromkeys(step.target.describe() for step in self.plan.steps)
        several = f" and {len(schemes) - 1} more" if len(schemes) > 1 else ""
        return f"{self.plan.target.name} {next(iter(schemes))}{several}"

    @property
    def how(self) -> str:
        """Return what is done to get it."""
        if self.stated is not None:
            said = ", ".join(f"{k}: {_json(v)}" for k, v in self.stated.items())
            return f"config: {said or 'moved to config.json'}"
        moves = dict.fromkeys(str(move) for step in self.plan.steps for move in step.moves)
        if self.plan.verdict is Verdict.COPIED:
            return "as it is"
        return ", ".join(moves) or "repacked"

    @property
    def says(self) -> str:
        """Return what the engine does."""
        if self.outcome is None:
            return "not known"
        why = f": {self.why}" if self.why and not self.runs else ""
        return f"{self.outcome.value}{why}"

    def as_json(self) -> dict[str, Any]:
        """Return the form as JSON values."""
        return {
            "format": self.plan.target.name,
            "form": self.name,
            "how": self.how,
            "bytes": self.nbytes,
            "answer": None if self.outcome is None else self.outcome.value,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class Search:
    """Every form that was considered, the source first.

    `unreachable` says of formats why not; `otherwise`, where no form is taken, what serving through
    qplug would take.
    """

    engine: Engine
    version: str
    forms: tuple[Form, ...]
    unreachable: Mapping[str, str]
    otherwise: str = ""

    @property
    def source(self) -> Form:
        """The checkpoint as it is."""
        return self.forms[0]

    def chosen(self) -> Form:
        """Return the cheapest form that the engine takes.

        Raises
        ------
        Refused
            Exit code 3: there is none; with what serving it through qplug would take.
        """
        best = self.best()
        if best is None:
            raise Refused(
                f"no exact form that {self.engine.title} {self.version} takes "
                f"(as it is: {self.source.says})",
                fix=self.otherwise,
            )
        return best

    def best(self) -> Form | None:
        """Return the cheapest form that the engine takes, if there is one."""
        running = [form for form in self.forms if form.runs]
        free = [form for form in running if form.plan.verdict is Verdict.COPIED]
        if free or not running:
            return free[0] if free else None
        most = SLACK * min(form.nbytes for form in running)
        same = self.source.plan.source

        def rank(form: Form) -> tuple[bool, int, int, str]:
            taken = [judge_at(engine, form.facts) for engine in ENGINES]
            count = sum(a is not None and a.outcome is Outcome.RUNS for a in taken)
            return form.plan.target is not same, -count, form.nbytes, form.plan.target.name

        return min((form for form in running if form.nbytes <= most), key=rank)

    def as_json(self) -> dict[str, Any]:
        """Return the search as JSON values."""
        return {
            "engine": self.engine.key,
            "version": self.version,
            "forms": [form.as_json() for form in self.forms],
            "unreachable": dict(self.unreachable),
        }


def search(
    checkpoint: Checkpoint,
    found: Format,
    model: ModelScheme,
    engine: Engine,
    at: Version,
    make: Planner,
    folder: str = "DIR",
    tp: int = 1,
) -> Search:
    """Judge a surveyed checkpoint, and every exact conversion of it, for one version of an engine.

    `make` plans a conversion of (a part of) the model; `folder` is what commands name; `tp` ranks
    are to share every linear.
    """
    total = sum(spec.nbytes for spec in checkpoint.headers.values())
    facts = replace(of_checkpoint(checkpoint, model), ranks=tp)
    as_it_is = make(model, found, Wishes())
    uneven = _uneven(model, tp)
    forms = [Form(as_it_is, total, judge_at(engine, facts, at, folder), facts, uneven=uneven)]
    if not (forms[0].runs or uneven) and (cured := repairs(engine, facts, at)) is not None:
        plan = replace(as_it_is, stated=cured[1])
        answer = judge_at(engine, cured[0], at, folder)
        forms.append(Form(plan, total, answer, cured[0], cured[1]))
    unreachable: dict[str, str] = {}
    for target in () if forms[-1].runs else _taken(engine):
        known = len(forms)
        for plans in _exact(model, target, make, tp):
            for plan in plans:
                try:
                    block = target.write(plan.goal).block or {}
                except QplugError as error:
                    unreachable[target.name] = str(error)
                    continue
                after = replace(of_converted(checkpoint, plan.goal, block), ranks=tp)
                before, now = plan.nbytes
                size = total - before + now
                forms.append(Form(plan, size, judge_at(engine, after, at, folder), after))
                if forms[-1].runs:
                    break  # finer groups would only cost more
        if len(forms) == known and target is not found:
            unreachable.setdefault(target.name, _why_not(make(model, target, Wishes(tp=tp))))
    version = ".".join(map(str, at))
    ordered = (forms[0], *sorted(forms[1:], key=_cost))
    otherwise = ""
    if not any(form.runs for form in forms):
        otherwise = _through_qplug(checkpoint, model, engine, make, folder)
        otherwise = f"on one rank: {otherwise}" if tp > 1 else otherwise
    return Search(engine, version, ordered, unreachable, otherwise)


def _taken(engine: Engine) -> Iterator[Format]:
    """Iterate over the formats that the engine takes in some form."""
    for target in formats.FORMATS:
        rules = engine.rules.get(target.name, ())
        if target.capacity is not None and any(rule.outcome is Outcome.RUNS for rule in rules):
            yield target


def _cost(form: Form) -> tuple[bool, int]:
    return form.stated is None, form.nbytes


def _uneven(model: ModelScheme, tp: int) -> str:
    """Return why ranks would get parts of groups; nothing where they get whole ones."""
    for module, scheme in model.linears.items():
        if tp > 1 and ROW_PARALLEL.search(module):
            if scheme.act_order:
                return f"columns of {module} in act order do not split between {tp} ranks"
            if scheme.in_features % (tp * scheme.group_size):
                size = f"{scheme.in_features} inputs of {module} in groups of {scheme.group_size}"
                return f"{size} do not split between {tp} ranks"
    return ""


def _exact(model: ModelScheme, target: Format, make: Planner, tp: int) -> Iterator[Iterator[Plan]]:
    """Iterate over the plans to one format that keep every weight, one for each result.

    Those of one width and symmetry come together, groups as they are first, then finer ones.
    """
    one_each: dict[Scheme, str] = {}
    for module, scheme in model.linears.items():
        one_each.setdefault(scheme, module)
    # What holds of one linear of each scheme holds of all; not so where act order is absorbed by
    # the linears before.
    ordered = any(scheme.act_order for scheme in one_each)
    # Nor between ranks, where names decide which side of a linear is split.
    whole_model = ordered or tp > 1
    few = replace(model, linears={module: scheme for scheme, module in one_each.items()})
    seen: set[tuple[Scheme, ...]] = set()

    def exact(part: ModelScheme, wishes: Wishes) -> Plan | None:
        try:
            plan = make(part, target, wishes)
        except QplugError:
            return None  # wishes that mean nothing for this format
        return plan if plan.verdict <= Verdict.EXACT else None

    def finer(bits: int | None, sym: bool) -> Iterator[Plan]:
        for size in (None,) if ordered else (None, *GROUP_SIZES):
            wishes = Wishes(bits=bits, group_size=size, sym=sym, tp=tp)
            plan = exact(model if whole_model else few, wishes)
            if plan is None or plan.verdict is Verdict.COPIED:  # a copy was looked at first
                continue
            goal = tuple(step.target for step in plan.steps)
            if goal in seen:
                return  # another width or symmetry that comes to the same
            seen.add(goal)
            whole = plan if whole_model else exact(model, wishes)
            if whole is not None:
                yield whole

    assert target.capacity is not None
    for bits in (None, *target.capacity.bits):
        for sym in (False, True):
            yield finer(bits, sym)


def _why_not(plan: Plan) -> str:
    """Return why a plan is not exact."""
    worst = plan.verdict
    first = next(step for step in plan.steps if step.verdict is worst)
    return f"{worst.name}: {first.reason}"


def _through_qplug(
    checkpoint: Checkpoint, model: ModelScheme, engine: Engine, make: Planner, folder: str
) -> str:
    """Return what serving the checkpoint through qplug would take: as it is, else converted."""
    facts = of_checkpoint(checkpoint, model)
    family = engine.key.partition("+")[0].partition("-")[0]
    others = [other for other in ENGINES if other.key.endswith("+qplug")]
    ways = []
    for other in sorted(others, key=lambda o: o.key != f"{family}+qplug"):
        answer = judge_at(other, facts, folder=folder)
        if answer is None:
            continue
        if answer.outcome is Outcome.RUNS:
            ways.append(f"{other.title}: {answer.command}")
            continue
        most = Verdict.REQUANTIZED if other.key == f"{family}+qplug" else Verdict.EXACT
        way = _converted(checkpoint, model, other, make, folder, most)
        refused = f"{other.title} does not take it either ({answer.why})"
        ways.append(f"{other.title}: {way}" if way else refused)
    return "; ".join(ways)


def _converted(
    checkpoint: Checkpoint,
    model: ModelScheme,
    engine: Engine,
    make: Planner,
    folder: str,
    most: Verdict,
) -> str:
    """Return the commands that make a form for qplug, no worse than `most`, and serve it."""
    found: list[tuple[Verdict, str]] = []
    for name in SERVED:
        plan = make(model, formats.find(name), Wishes())
        if plan.verdict > most:
            continue
        try:
            block = plan.target.write(plan.goal).block or {}
        except QplugError:
            continue  # a config of this format cannot say it
        answer = judge_at(engine, of_converted(checkpoint, plan.goal, block), folder="NEW")
        if answer is None or answer.outcome is not Outcome.RUNS:
            continue
        allow = " --allow requantized" if plan.verdict is Verdict.REQUANTIZED else ""
        convert = f"qplug convert {quote(folder)} NEW --to {name}{allow}"
        found.append((plan.verdict, f"{convert}, then {answer.command}"))
    return min(found, key=lambda pair: pair[0])[1] if found else ""


def _json(value: Any) -> str:
    text = "left out" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
