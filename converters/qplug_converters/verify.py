"""Whether two checkpoints hold the same weights, computed from their bytes alone.

For every quantized linear, in blocks of rows: `code - zero` of every weight, the scale of every
weight bit for bit, and the float32 weights. For every other tensor: its bytes. For the model: its
config. Layouts may differ; either side may be dense.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .codec import TORCH_DTYPES
from .errors import QplugError
from .format import Format
from .job import blocks_of, read_rows, stored_names
from .layout import Layout
from .plan import Verdict
from .scheme import ModelScheme, Scheme
from .survey import survey
from .threads import workers
from .weight import AffineGrid, QuantizedWeight

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
    """One of the two checkpoints, with what it says of its linears."""

    checkpoint: Checkpoint
    format: Format | None
    model: ModelScheme | None
    layouts: dict[str, Layout] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        """Read and survey a checkpoint; a dense one has no format."""
        if checkpoint.detect().read is None:
            return cls(checkpoint, None, None)
        found, model = checkpoint.scheme()
        model = survey(checkpoint, found, model)
        layouts = {name: found.layout(scheme) for name, scheme in model.linears.items()}
        return cls(checkpoint, found, model, layouts)

    def scheme(self, module: str) -> Scheme | None:
        """Return the scheme of a module if it is quantized here."""
        return self.model.linears.get(module) if self.model is not None else None

    def rest(self, modules: set[str]) -> dict[str, str]:
        """Return the tensors that belong to none of the linears compared."""
        mine = {n for m, layout in self.layouts.items() for n in stored_names(layout, m)}
        dense = {f"{m}.weight" for m in modules if m not in self.layouts}
        return {n: n for n in self.checkpoint.headers if n not in mine | dense}


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
        if name in two:
            if first.headers[name] != second.headers[name]:
                problems.append(f"{name}: {first.headers[name]} and {second.headers[name]}")
            elif first.raw(name) != second.raw(name):
                problems.append(f"{name}: the bytes differ")
            else:
                equal += 1
    problems += _configs(a, b)
    known = a.model.notes if a.model is not None else ()
    new = [n for n in (b.model.notes if b.model is not None else ()) if n not in known]
    # What the first already contradicts itself about is its own affair; what only the second
    # does, somebody changed.
    problems += [f"config of the second: {note}" for note in new]
    notes = list(known)
    worst = max((r.verdict for r in reports), default=Verdict.EXACT)
    return Certificate(worst, tuple(reports), weights, equal, tuple(problems), tuple(notes))


def _numel(a: Side, b: Side, module: str) -> int:
    scheme = a.scheme(module) or b.scheme(module)
    assert scheme is not None
    return scheme.numel


def _configs(a: Side, b: Side) -> list[str]:
    """Compare config.json outside the quantization block, and the dtype where neither is dense."""
    ignored = {"quantization_config", "compression_config", "transformers_version", "_name_or_path"}
    if a.format is None or b.format is None:
        ignored |= {"dtype", "torch_dtype"}
    one, two = (
        {k: _plain(v) for k, v in side.checkpoint.config.items() if k not in ignored}
        for side in (a, b)
    )
    found = [
        f"config.json {key}: {json.dumps(one.get(key))} and {json.dumps(two.get(key))}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
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
    shapes = []
    for side in (a, b):
        scheme = side.scheme(module)
        spec = side.checkpoint.headers.get(f"{module}.weight")
        if scheme is not None:
            shapes.append((scheme.out_features, scheme.in_features))
        elif spec is not None and len(spec.shape) == 2:
            shapes.append((spec.shape[0], spec.shape[1]))
        else:
            return f"no weight in {side.checkpoint.folder.name}"
    if shapes[0] != shapes[1]:
        return f"[out, in] is {shapes[0]} and {shapes[1]}"
    scheme = a.scheme(module) or b.scheme(module)
    assert scheme is not None
    layouts = [side.layouts[module] for side in (a, b) if module in side.layouts]
    differing, largest, summed = 0, 0.0, 0.0
    rounded = True
    for start, stop in blocks_of(scheme, *layouts, most=BLOCK):
        one, two = _rows(a, module, start, stop), _rows(b, module, start, stop)
        if _affine(one) and _affine(two):
            assert isinstance(one, QuantizedWeight)
            assert isinstance(two, QuantizedWeight)
            unequal = _grids_differ(one, two)
            if unequal is None:
                continue
            rounded = rounded and _scales_rounded(one, two)
            difference = (one.dequantize() - two.dequantize()).abs()
        else:
            left, right = _dense(one), _dense(two)
            difference = (left.float() - right.float()).abs()
            unequal = difference != 0
            narrow = min(left.dtype, right.dtype, key=lambda d: d.itemsize)
            rounded = rounded and torch.equal(left.to(narrow), right.to(narrow))
        differing += int(unequal.sum())
        largest = max(largest, float(difference.max()))
        summed += float(difference.double().sum())
    if differing == 0:
        return LinearReport(module, Verdict.EXACT)
    verdict = Verdict.ROUNDED if rounded else Verdict.REQUANTIZED
    return LinearReport(module, verdict, differing, largest, summed / scheme.numel)


def _rows(side: Side, module: str, start: int, stop: int) -> QuantizedWeight | Tensor:
    scheme = side.scheme(module)
    if scheme is not None:
        return read_rows(side.checkpoint, side.layouts[module], scheme, module, start, stop)
    tensor = side.checkpoint.tensor(f"{module}.weight")[start:stop]
    if not tensor.is_floating_point() or tensor.dtype not in TORCH_DTYPES.values():
        raise QplugError(str(tensor.dtype), f"{module}.weight", "a floating-point weight")
    return tensor


def _affine(weight: QuantizedWeight | Tensor) -> bool:
    return isinstance(weight, QuantizedWeight) and isinstance(weight.grid, AffineGrid)


def _dense(weight: QuantizedWeight | Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _scales_rounded(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    """Whether only scales differ, and one side's are the other's, rounded to its dtype."""
    if not torch.equal(one.integers(), two.integers()):
        return False
    inp = one.in_features
    a, b = (w.affine.spread(w.affine.scales, inp) for w in (one, two))
    return torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)


def _grids_differ(one: QuantizedWeight, two: QuantizedWeight) -> Tensor | None:
    """Return where `code - zero` or the bits of the scale differ, bool `[out, in]`, or `None`."""
    bits = [w.affine.scales.float().view(torch.int32) for w in (one, two)]
    if (one.affine.g_idx, two.affine.g_idx) == (None, None) and bits[0].shape == bits[1].shape:
        alike = one.affine.group_size == two.affine.group_size and torch.equal(*bits)
        if alike and torch.equal(one.affine.zeros, two.affine.zeros):
            if torch.equal(one.codes, two.codes):
                return None
        elif alike and torch.equal(one.integers(), two.integers()):
            return None
    inp = one.in_features
    scales = [w.affine.spread(b, inp) for w, b in zip((one, two), bits, strict=True)]
    unequal = (one.integers() != two.integers()) | (scales[0] != scales[1])
    return unequal if bool(unequal.any()) else None
