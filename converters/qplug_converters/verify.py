"""Whether two checkpoints hold the same weights, computed from their bytes alone.

For every quantized linear, in blocks of rows: `code - zero` of every weight, the scale of every
weight bit for bit, and the float32 weights. For every other tensor: its bytes. For the model: its
config. Layouts may differ; either side may be dense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .blocks import blocks_of, read_rows, stored_names
from .checkpoint import Checkpoint
from .codec import TORCH_DTYPES
from .compare import SAME, Rows, columns, compare, dense
from .digest import bytes_of
from .errors import QplugError
from .families import families, make, widened
from .format import Format
from .layout import Holds, Layout, TensorSpec
from .moves import column_order
from .names import normal
from .scheme import ModelScheme, Scheme
from .source import REPAIR
from .survey import survey
from .threads import workers
from .verdict import Verdict

Progress = Callable[[int, int, str], None]
BLOCK = 1 << 22
"""Codes compared at a time; a comparison holds up to 30 bytes per weight."""


@dataclass(frozen=True, slots=True)
class LinearReport:
    """How one linear differs: EXACT, ROUNDED (equal once rounded to B's dtype) or worse."""

    module: str
    verdict: Verdict
    differing: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0


@dataclass(frozen=True, slots=True)
class Certificate:
    """The answer of `verify`."""

    verdict: Verdict
    linears: tuple[LinearReport, ...]
    weights: int
    tensors_equal: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.verdict <= Verdict.EXACT and not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "same": self.same,
            "verdict": self.verdict.name,
            "weights": self.weights,
            "tensors_equal": self.tensors_equal,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "linears": [
                {
                    "module": r.module,
                    "verdict": r.verdict.name,
                    "differing": r.differing,
                    "max_abs": r.max_abs,
                    "mean_abs": r.mean_abs,
                }
                for r in self.linears
            ],
        }


@dataclass(slots=True)
class Side:
    """One of the two checkpoints, with what it says of its linears.

    Linears and tensors are known by names of their roles (`names.normal`); `own` has the names of
    the file.
    `orders` and `columns` are orders in which output rows and inputs of linears are to be taken,
    and `padded` linears with features of zeros that the other side lacks.
    """

    checkpoint: Checkpoint
    format: Format | None
    model: ModelScheme | None
    layouts: dict[str, Layout]
    own: dict[str, str]
    orders: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    padded: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        """Read and survey a checkpoint; a dense one has no format."""
        own = {new: name for name in checkpoint.headers for new in normal(name)}
        if checkpoint.detect().read is None:
            return cls(checkpoint, None, None, {}, own)
        found, model = checkpoint.scheme()
        model = survey(checkpoint, found, model)
        own |= {normal(name)[0]: name for name in model.linears}
        linears = {normal(name)[0]: scheme for name, scheme in model.linears.items()}
        layouts = {name: found.layout(scheme) for name, scheme in linears.items()}
        dense = tuple(normal(name)[0] for name in model.dense)
        model = replace(model, linears=linears, dense=dense)
        return cls(checkpoint, found, model, layouts, own)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by the name of its role."""
        headers = self.checkpoint.headers
        return {new: headers[name] for new, name in self.own.items() if name in headers}

    def spec(self, name: str) -> TensorSpec | None:
        """Return dtype and shape of a tensor, if it is here."""
        return self.checkpoint.headers.get(self.own[name]) if name in self.own else None

    def scheme(self, module: str) -> Scheme | None:
        """Return the scheme of a module if it is quantized here."""
        return self.model.linears.get(module) if self.model is not None else None

    def shape(self, module: str) -> tuple[int, int] | None:
        """Return [out, in] of a linear, if it is here."""
        scheme = self.scheme(module)
        if scheme is not None:
            return scheme.out_features, scheme.in_features
        spec = self.spec(f"{module}.weight")
        return None if spec is None or len(spec.shape) != 2 else (spec.shape[0], spec.shape[1])

    def rows(self, module: str, start: int, stop: int) -> Rows:
        """Return output rows of a linear, dense or quantized, in the order that is to be taken."""
        scheme, order = self.scheme(module), self.orders.get(module)
        if scheme is not None:
            found: Rows = read_rows(
                self.checkpoint, self.layouts[module], scheme, self.own[module], start, stop, order
            )
        else:
            whole = self.checkpoint.tensor(self.own[f"{module}.weight"])
            if not whole.is_floating_point() or whole.dtype not in TORCH_DTYPES.values():
                raise QplugError(
                    str(whole.dtype), f"{module}.weight", "a floating-point weight", REPAIR
                )
            found = whole[start:stop] if order is None else whole[order[start:stop]]
        by = self.columns.get(module)
        return found if by is None else columns(found, by)

    def other(self, name: str) -> Tensor:
        """Return a tensor of no quantized linear, its rows in the order that is to be taken."""
        order = self.orders.get(name.rpartition(".")[0])
        tensor = self.checkpoint.tensor(self.own[name])
        return tensor if order is None else tensor.index_select(0, order)

    def rest(self, modules: set[str]) -> dict[str, TensorSpec]:
        """Return the tensors that belong to none of the linears compared."""
        mine = {n for m, layout in self.layouts.items() for n in stored_names(layout, m)}
        dense = {f"{m}.weight" for m in modules if m not in self.layouts}
        return {name: spec for name, spec in self.tensors.items() if name not in mine | dense}


def verify(
    first: Checkpoint, second: Checkpoint, *, progress: Progress | None = None
) -> Certificate:
    """Compare two checkpoints.

    Raises
    ------
    QplugError
        If either is damaged or contradicts itself.
    """
    a, b = Side.of(first), Side.of(second)
    modules = list(dict.fromkeys([*a.layouts, *b.layouts]))
    widths = _correspond(a, b)
    problems: list[str] = []
    reports: list[LinearReport] = []
    weights = done = 0
    total = sum(_numel(a, b, m) for m in modules)
    with workers() as pool:
        found = pool.map(lambda module: _compare(a, b, module), modules)
        for module, report in zip(modules, found, strict=True):
            if isinstance(report, str):
                problems.append(f"{module}: {report}")
            else:
                reports.append(report)
                weights += _numel(a, b, module)
            done += _numel(a, b, module)
            if progress is not None:
                progress(done, total, module)
    one, two = a.rest(set(modules)), b.rest(set(modules))
    problems += [f"{name}: only in the first" for name in one if name not in two]
    problems += [f"{name}: only in the second" for name in two if name not in one]
    equal = 0
    for name in one:
        if name not in two:
            continue
        if problem := _bytes_differ(a, b, name):
            problems.append(f"{name}: {problem}")
        else:
            equal += 1
    for one_of in (first, second):
        one_of.unchanged()
    problems += _configs(a, b, widths)
    known = a.model.notes if a.model is not None else ()
    new = [n for n in (b.model.notes if b.model is not None else ()) if n not in known]
    # What the first already contradicts itself about is its own affair; what only the second
    # does, somebody changed.
    problems += [f"config of the second: {note}" for note in new]
    notes = [*known, *_said(a, b, widths)]
    worst = max((r.verdict for r in reports), default=Verdict.EXACT)
    return Certificate(worst, tuple(reports), weights, equal, tuple(problems), tuple(notes))


def weights_sha256(side: Side, module: str) -> str:
    """Return the hash of the float32 weights of a linear, row by row."""
    shape = side.shape(module)
    assert shape is not None
    found = hashlib.sha256()
    step = max(1, BLOCK // max(1, shape[1]))
    if module in side.layouts:
        scheme = side.scheme(module)
        assert scheme is not None
        blocks = blocks_of(scheme, side.layouts[module], most=BLOCK)
    else:
        blocks = [(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
    for start, stop in blocks:
        found.update(bytes_of(dense(side.rows(module, start, stop)).float()))
    return found.hexdigest()


def deep(side: Side, *, progress: Progress | None = None) -> dict[str, str]:
    """Return the hash of the float32 weights of every quantized linear."""
    found = {}
    with workers() as pool:
        hashes = pool.map(lambda module: weights_sha256(side, module), side.layouts)
        for n, (module, sha256) in enumerate(zip(side.layouts, hashes, strict=True), 1):
            found[module] = sha256
            if progress is not None:
                progress(n, len(side.layouts), module)
    return found


def _bytes_differ(a: Side, b: Side, name: str) -> str:
    """Say how a tensor of no quantized linear differs, if it does."""
    one, two = a.spec(name), b.spec(name)
    assert one is not None
    assert two is not None
    module = name.rpartition(".")[0]
    longer = module in b.padded and one.shape[1:] == two.shape[1:] and one.shape < two.shape
    if one.dtype != two.dtype or (one.shape != two.shape and not longer):
        return f"{one} and {two}"
    if module in a.orders or module in b.orders or longer:
        left, right = a.other(name), b.other(name)
        same = torch.equal(left.view(torch.uint8), right[: len(left)].view(torch.uint8))
        same = same and not bool(right[len(left) :].any())
    else:
        same = a.checkpoint.raw(a.own[name]) == b.checkpoint.raw(b.own[name])
    return "" if same else "the bytes differ"


def _said(a: Side, b: Side, widths: Mapping[int, int]) -> list[str]:
    """Return what was found out of features that correspond, one sentence each."""
    taken = len(a.columns) + len(b.columns)
    notes = [f"act order of {taken} MLPs is taken over by the linears before"] if taken else []
    return notes + [
        f"MLPs of {before} inner features are {after} wide in the second, the rest being zeros"
        for before, after in widths.items()
    ]


def _numel(a: Side, b: Side, module: str) -> int:
    scheme = a.scheme(module) or b.scheme(module)
    assert scheme is not None
    return scheme.numel


def _configs(a: Side, b: Side, widths: Mapping[int, int]) -> list[str]:
    """Compare config.json outside the quantization block, and the dtype where neither is dense."""
    ignored = {"quantization_config", "compression_config", "transformers_version", "_name_or_path"}
    if a.format is None or b.format is None:
        ignored |= {"dtype", "torch_dtype"}
    one, two = (
        {k: _plain(v) for k, v in config.items() if k not in ignored}
        for config in (widened(a.checkpoint.config, widths), b.checkpoint.config)
    )
    found = [
        f"config.json {key}: {json.dumps(one.get(key))} and {json.dumps(two.get(key))}"
        for key in sorted(one.keys() | two.keys())
        if json.dumps(one.get(key), sort_keys=True) != json.dumps(two.get(key), sort_keys=True)
    ]
    return found + _blocks(a, b)


def _blocks(a: Side, b: Side) -> list[str]:
    """Compare the quantization configs of two checkpoints of one format."""
    if a.format is None or a.format is not b.format or a.model is None or b.model is None:
        return []
    one, two = a.model.block, b.model.block
    return [
        f"quantization_config {key}: {json.dumps(one[key])} and {json.dumps(two[key])}"
        for key in a.format.decisive
        if one.get(key) is not None and two.get(key) is not None and one[key] != two[key]
    ]


def _plain(value: Any) -> Any:
    """Drop a quantization block from a sub-config."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != "quantization_config"}
    return value


def _compare(a: Side, b: Side, module: str) -> LinearReport | str:
    """Compare one linear, whatever the layouts; return why it cannot be, as a string."""
    shapes = [side.shape(module) for side in (a, b)]
    for side, shape in zip((a, b), shapes, strict=True):
        if shape is None:
            return f"no weight in {side.checkpoint.folder.name}"
    (out, inp), (rows, columns_of) = shapes  # type: ignore[misc]
    if (out, inp) != (rows, columns_of) and module not in b.padded:
        return f"[out, in] is {shapes[0]} and {shapes[1]}"
    scheme = a.scheme(module) or b.scheme(module)
    assert scheme is not None
    layouts = [side.layouts[module] for side in (a, b) if module in side.layouts]
    found = SAME
    for start, stop in blocks_of(replace(scheme, out_features=out), *layouts, most=BLOCK):
        one, two = a.rows(module, start, stop), b.rows(module, start, stop)
        if columns_of > inp:
            if bool(dense(two)[:, inp:].any()):
                return f"inputs from {inp} on are not 0 in {b.checkpoint.folder.name}"
            two = columns(two, torch.arange(inp))
        found += compare(one, two)
    if rows > out and bool(dense(b.rows(module, out, rows)).any()):
        return f"outputs from {out} on are not 0 in {b.checkpoint.folder.name}"
    if found.differing == 0:
        return LinearReport(module, Verdict.EXACT)
    verdict = Verdict.ROUNDED if found.rounded else Verdict.REQUANTIZED
    mean = found.summed / scheme.numel
    return LinearReport(module, verdict, found.differing, found.largest, mean)


def _correspond(a: Side, b: Side) -> dict[int, int]:
    """Find out which features of which MLPs stand in another order, or are padded with zeros.

    An act order that one side has and the other does not may have been taken over by the linears
    before; then the first rows of the last linear say so. Returns the widths that grew.
    """
    widths: dict[int, int] = {}
    modules = [*a.layouts, *b.layouts, *(a.model.dense if a.model else ())]
    for last, names in families(modules, a.tensors).items():
        for side, other in ((a, b), (b, a)):
            scheme, plain = side.scheme(last), other.scheme(last)
            if scheme is None or not scheme.act_order or (plain is not None and plain.act_order):
                continue
            made = {name: side.shape(name) for name in names}
            if not make(scheme.in_features, made, side.checkpoint.headers):
                continue
            part = side.layouts[last].part(Holds.G_IDX)
            assert part is not None
            order = column_order(side.checkpoint.tensor(f"{side.own[last]}.{part.name}"))
            step = side.layouts[last].row_step(scheme.sizes)
            mine, theirs = (s.rows(last, 0, min(step, scheme.out_features)) for s in (side, other))
            inp = torch.arange(scheme.in_features)
            theirs = columns(theirs, inp)  # of a padded one, those that were there before
            kept, moved = compare(mine, theirs), compare(columns(mine, order), theirs)
            if moved.differing < kept.differing:
                side.columns[last] = order
                side.orders |= dict.fromkeys(names, order)
        one, two = a.shape(last), b.shape(last)
        if one is not None and two is not None and one[0] == two[0] and one[1] < two[1]:
            widths[one[1]] = two[1]
            b.padded |= {last, *names}
    return widths
