"""What a conversion will do to each linear, known before one weight is read.

A plan is pure: a surveyed `ModelScheme` and a target go in, a verdict, moves and a reason per
linear come out (`route` finds those of one linear). Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Any

from .block import stated_group_size
from .errors import QplugError, Refused
from .families import MEMBERS, families, make
from .format import Format, Headers
from .names import renames
from .route import Look, divides, find_route
from .scheme import Kind, ModelScheme, Scheme
from .verdict import ALONE, Move, Place, Step, Verdict, Wishes

__all__ = ["Move", "Plan", "Step", "Verdict", "Wishes", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do.

    `reordered` are tensors outside quantized linears whose first axis takes the order of a
    linear's `g_idx` (biases and dense weights of absorbed act order [X5b]), by that linear.
    `stated`, of a plan that copies everything, are keys that the config is to state otherwise
    (`None`: to leave out), in config.json.
    `widened` are MLPs' inner widths that zeros are added to [X9], by the width before, and
    `padded` biases of such MLPs, by their new length. `renamed` are modules and tensors that
    readers of the target call otherwise (two names for a scale of keys and values).
    """

    source: Format
    target: Format
    model: ModelScheme
    steps: tuple[Step, ...]
    wishes: Wishes
    reordered: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Any] | None = None
    widened: Mapping[int, int] = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any linear."""
        return max(step.verdict for step in self.steps)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many linears have which verdict."""
        return dict(sorted(Counter(step.verdict for step in self.steps).items()))

    @property
    def copied_whole(self) -> bool:
        """Whether nothing changes, so that the source's own config stays right."""
        return _copied(self.source, self.target, self.wishes, self.model)

    @property
    def goal(self) -> ModelScheme:
        """The scheme of the converted model."""
        linears = {step.written: step.target for step in self.steps}
        dense = tuple(self.renamed.get(name, (name,))[0] for name in self.model.dense)
        return replace(self.model, format=self.target.name, linears=linears, dense=dense)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the quantized linears before and after."""
        before = after = 0
        for step in self.steps:
            before += _size(self.source, step.source)
            after += _size(self.target, step.target)
        return before, after

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the source, and what the target's config cannot say."""
        if self.copied_whole or not self.model.kv_scheme or self.target.says_kv:
            return self.model.notes
        return (
            *self.model.notes,
            f"scales of the KV cache are carried, and configs of {self.target.name} have no key "
            "for them: vLLM takes them with --kv-cache-dtype fp8",
        )

    def refuse_above(self, allow: Verdict) -> None:
        """Raise if the plan is worse than `allow`.

        Raises
        ------
        Refused
            Exit code 3: worse than allowed, or impossible.
        """
        worst = self.verdict
        if worst is not Verdict.IMPOSSIBLE and worst <= allow:
            return
        bad = [s for s in self.steps if s.verdict is worst]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        fix = bad[0].fix
        if worst is not Verdict.IMPOSSIBLE:
            need = f"--allow {worst.name.lower()}"
            fix = f"{fix}; or {need}" if fix else need
        raise Refused(f"{worst.name}: {bad[0].reason}", f"{bad[0].module}{more}", fix=fix)


def _size(known: Format, scheme: Scheme) -> int:
    return sum(spec.nbytes for spec in known.layout(scheme).specs(scheme.sizes).values())


def _copied(source: Format, target: Format, wishes: Wishes, model: ModelScheme) -> bool:
    """Whether bytes and config stay: the source's config names the rule its zeros are read by."""
    stays = source is target and wishes.none and not (model.forced or model.unstacked)
    return stays and all(source.current(scheme) for scheme in model.linears.values())


def make_plan(
    source: Format,
    model: ModelScheme,
    target: Format,
    wishes: Wishes | None = None,
    *,
    headers: Headers | None = None,
    model_type: str | None = None,
    look: Look | None = None,
) -> Plan:
    """Decide what happens to each linear of a surveyed model.

    With `headers`, all the tensors of the checkpoint, act order is absorbed where that is exact,
    and tensors are called what readers of the target call them in a `model_type`; with `look`,
    which reads the codes of one linear, zeros are shifted where the codes leave room.

    Raises
    ------
    QplugError
        If the wishes make no sense for the target.
    """
    wishes = wishes or Wishes()
    if wishes.group_size is not None and wishes.group_size < 1 and wishes.group_size != -1:
        raise QplugError(
            f"{wishes.group_size}", "--group-size", "-1 or a positive number", "choose another size"
        )
    holds = target.capacity
    if wishes.bits is not None and (holds is None or wishes.bits not in holds.bits):
        offered = ", ".join(map(str, holds.bits)) if holds else "no number of bits"
        raise QplugError(
            f"{wishes.bits}", "--bits", f"{offered} for {target.name}", "choose what it holds"
        )
    if _copied(source, target, wishes, model):
        steps = tuple(Step(m, Verdict.COPIED, s, s) for m, s in model.linears.items())
        return Plan(source, target, model, steps, wishes)
    groups = families((*model.linears, *model.dense), headers or {})
    mlps = {
        last: names
        for last, names in groups.items()
        if last in model.linears and _made_for(model, last, names, headers or {})
    }
    absorbed: dict[str, tuple[str, ...]] = {}
    if holds is not None and (not holds.act_order or wishes.tp > 1):
        absorbed = {
            last: names
            for last, names in mlps.items()
            if model.linears[last].act_order and model.linears[last].sortable
        }
    widened = _widened(model, mlps, target, wishes)
    places = {last: Place(absorbed=True) for last in absorbed}
    for last, names in mlps.items():
        width = widened.get(model.linears[last].in_features, 0)
        places[last] = Place(absorbed=last in absorbed, in_features=width)
        for name in names:
            places[name] = Place(rows_from=last if last in absorbed else "", out_features=width)

    def steps_for(asked: Wishes) -> tuple[Step, ...]:
        return tuple(
            find_route(module, scheme, target, asked, look, places.get(module, ALONE))
            for module, scheme in model.linears.items()
        )

    steps = steps_for(wishes)
    if holds is not None and holds.uniform:
        fine = [s.target for s in steps if s.verdict is not Verdict.IMPOSSIBLE]
        group_of = stated_group_size(fine, ragged=False)
        if len({group_of(scheme) for scheme in fine}) > 1:
            # The config can name one group size only: split all to one. New codes take any.
            kept = [s.target.group_size for s in steps if s.verdict <= Verdict.ROUNDED]
            refits = [s.target.in_features for s in steps if s.refits]
            common = gcd(*(kept or [scheme.group_size for scheme in fine]), *refits)
            steps = steps_for(replace(wishes, group_size=common))
    reordered = {
        tensor: down
        for down, names in absorbed.items()
        for name in names
        for tensor in (f"{name}.weight", f"{name}.bias")
        if headers is not None and tensor in headers
    }
    new_names = _renamed(source, model, target, headers or {}, model_type)
    steps = tuple(
        replace(s, name=new_names[s.module][0]) if s.module in new_names else s for s in steps
    )
    if source is target and not (model.forced or model.unstacked):
        steps = tuple(_untouched(step, source) for step in steps)
    padded = {
        f"{name}.bias": place.out_features
        for name, place in places.items()
        if place.out_features and headers is not None and f"{name}.bias" in headers
    }
    return Plan(
        source,
        target,
        model,
        steps,
        wishes,
        reordered=reordered,
        widened=widened,
        padded=padded,
        renamed=new_names,
    )


def _untouched(step: Step, known: Format) -> Step:
    """Return a step that changes nothing as one that copies bytes."""
    changes = step.moves or step.refits or step.rows_from or step.name or step.padding
    same = known.layout(step.source) == known.layout(step.target)
    if changes or not same or not known.current(step.source) or step.verdict > Verdict.EXACT:
        return step
    return replace(step, verdict=Verdict.COPIED, target=step.source, reason="")


def _renamed(
    source: Format, model: ModelScheme, target: Format, headers: Headers, model_type: str | None
) -> dict[str, tuple[str, ...]]:
    """Return new names of linears, and of tensors and modules that belong to none."""
    mine = {
        f"{module}.{part.name}"
        for module, scheme in model.linears.items()
        for part in source.layout(scheme)
    }
    others = [name for name in headers if name not in mine]
    return renames([*model.linears, *model.dense, *others], model_type, target.name)


def _made_for(model: ModelScheme, last: str, names: tuple[str, ...], headers: Headers) -> bool:
    """Whether linears make as many features as the last one of their MLP takes."""
    shapes = {
        name: (model.linears[name].out_features,)
        if name in model.linears
        else headers[f"{name}.weight"].shape
        for name in names
    }
    return make(model.linears[last].in_features, shapes, headers)


def _widened(
    model: ModelScheme, mlps: Iterable[str], target: Format, wishes: Wishes
) -> dict[int, int]:
    """Return the widths of MLPs that do not split between the ranks, with widths that do.

    All linears of such MLPs must be quantized, or zeros could not be added to all alike; and what
    is added is rows and columns of an affine grid.
    """
    found: dict[int, int] = {}
    holds, tp = target.capacity, wishes.tp
    if holds is None or holds.kind is not Kind.AFFINE or tp == 1:
        return found
    for last in mlps:
        scheme = model.linears[last]
        bits = wishes.bits or min((b for b in holds.bits if b >= scheme.bits), default=scheme.bits)
        size = wishes.group_size or scheme.group_size
        words = lcm(holds.in_multiple(bits), holds.out_multiple(bits))
        if size < 1 or divides(scheme.in_features, size, tp, words):
            continue
        step = tp * lcm(words, min(size, scheme.in_features))
        found[scheme.in_features] = -(-scheme.in_features // step) * step
    return {} if any(m.rpartition(".")[2] in MEMBERS for m in model.dense) else found
