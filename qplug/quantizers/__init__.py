"""Quantizers: one file an algorithm; weights in, a `QuantizedWeight` out, never a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplug_converters.block import dense_linears, dense_modules
from qplug_converters.checkpoint import Checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import Progress, execute
from qplug_converters.format import Format
from qplug_converters.formats import dense as dense_format
from qplug_converters.layout import FLOATS
from qplug_converters.plan import Plan, Step, Verdict, Wishes
from qplug_converters.scheme import ModelScheme, Scheme
from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_converters.writer import MAX_SHARD

from . import rtn

Quantizer = Callable[[Tensor, Scheme, tuple[int, int]], QuantizedWeight]
"""`(weight float [rows, in], scheme, lowest and highest zero) -> QuantizedWeight`."""

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn.quantize}
"""Every algorithm by the name that `--method` takes."""

_CHUNK = 1 << 20
"""Weights quantized at a time: temporaries stay in the cache."""
_KEPT = {
    **dict.fromkeys(("lm_head", "score", "classifier"), "heads"),
    **dict.fromkeys(("gate", "router", "shared_expert_gate"), "routers"),
}
"""Last components of linears that stay dense: heads, and routers whose errors flip experts."""
_KEPT_TOWERS = ("visual", "vision", "audio", "multi_modal", "mm_projector")
_WHY_KEPT = {
    "heads": "heads stay in full precision",
    "routers": "routers stay in full precision: their errors flip experts",
    "towers": "towers for images and sound stay in full precision",
    "dtypes": "weights that are not float32, float16 or bfloat16 stay as they are",
}
_SMALLEST_GROUP = 16
"""The smallest group size that is proposed: below it the scales outweigh what they save."""


@dataclass(frozen=True, slots=True)
class LeftDense:
    """Linears that stay dense for one reason.

    `kind` is `heads`, `routers`, `towers`, `dtypes`, or `shapes`: what the target cannot hold.
    """

    kind: str
    reason: str
    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was quantized and how well.

    `errors` are relative Frobenius errors |W - Q| / |W| per linear; `relative_error` is that of
    all linears together. `dense` are the linears that stay dense, by reason.
    """

    scheme: str
    errors: Mapping[str, float]
    relative_error: float
    dense: tuple[LeftDense, ...]

    @property
    def worst(self) -> str:
        """The linear with the largest error."""
        return max(self.errors, key=lambda module: self.errors[module])

    @property
    def left_dense(self) -> tuple[str, ...]:
        """The linears that the target cannot hold."""
        return tuple(m for left in self.dense if left.kind == "shapes" for m in left.linears)


def linears_of(checkpoint: Checkpoint) -> list[str]:
    """Return the linears of the language model's blocks, by the names in use.

    Raises
    ------
    QplugError
        If the checkpoint is quantized already, or stores linears transposed (GPT-2's Conv1D).
    """
    if checkpoint.detect().read is not None:
        raise QplugError(
            f"a {checkpoint.detect().name} checkpoint",
            str(checkpoint.folder),
            "full precision",
            "`qplug convert` changes the layout of quantized weights",
        )
    kind = checkpoint.config.get("model_type")
    if kind in ("gpt2", "imagegpt", "openai-gpt"):
        raise QplugError(
            f"model_type {kind!r}",
            "config.json",
            "linears stored as [out, in]",
            "this architecture is not supported",
        )
    return [m for m in dense_linears(dense_modules(checkpoint.headers)) if not _kept(checkpoint, m)]


def _kept(checkpoint: Checkpoint, module: str) -> str:
    """Return the kind of linear that `module` is if its kind stays dense, else nothing."""
    if kind := _KEPT.get(module.rpartition(".")[2]):
        return kind
    if any(tower in module for tower in _KEPT_TOWERS):
        return "towers"
    return "" if checkpoint.headers[f"{module}.weight"].dtype in FLOATS else "dtypes"


def quantize(
    checkpoint: Checkpoint,
    target_folder: Path,
    target: Format,
    quantizer: Quantizer,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    allow_dense: bool = False,
    progress: Progress | None = None,
    max_shard: int = MAX_SHARD,
) -> QuantizeReport:
    """Quantize the linears of a full-precision checkpoint into a new folder.

    A linear whose shape the target cannot hold stays dense and is reported; `allow_dense` permits
    that of more than half of them.

    Raises
    ------
    QplugError
        If the target cannot hold the scheme at all, the checkpoint is no dense one, or the group
        size fits too few linears.
    """
    holds = target.capacity
    if holds is None or bits not in holds.bits:
        offered = ", ".join(map(str, holds.bits)) if holds else "no number of bits"
        raise QplugError(
            f"{bits}", "--bits", f"{offered} for {target.name}", "choose what it holds"
        )
    if bits == 1 and sym:
        raise QplugError("1 symmetric bit", "--bits", "2 or more", "use --asym, or more bits")
    if group_size != -1 and group_size < 1:
        raise QplugError(
            f"{group_size}", "--group-size", "-1 or a positive number", "choose another size"
        )
    steps, dense = _steps(checkpoint, target, bits, group_size, sym)
    _check_enough(checkpoint, target, steps, dense, group_size, allow_dense)
    taken = {step.module for step in steps}
    stay = tuple(m for m in dense_modules(checkpoint.headers) if m not in taken)
    model = ModelScheme("dense", {s.module: s.source for s in steps}, stay)
    plan = Plan(dense_format.FORMAT, target, model, tuple(steps), Wishes(bits=bits))
    span = holds.zeros(bits)
    squares: dict[str, tuple[float, float]] = {}

    def rows(step: Step, start: int, stop: int) -> QuantizedWeight:
        stored = checkpoint.tensor(f"{step.module}.weight")
        height = max(1, _CHUNK // step.source.in_features)
        pieces = []
        error, norm = squares.get(step.module, (0.0, 0.0))
        for at in range(start, stop, height):
            weight = stored[at : min(at + height, stop)].float()
            if not bool(torch.isfinite(weight).all()):
                raise QplugError(
                    "NaN or infinite weights",
                    f"{step.module}.weight",
                    "numbers",
                    "the source is damaged: download or train it again",
                )
            pieces.append(quantizer(weight, step.source, span))
            norm += float(torch.linalg.vector_norm(weight)) ** 2
            error += float(torch.linalg.vector_norm(weight - pieces[-1].dequantize())) ** 2
        squares[step.module] = (error, norm)
        return _stack(pieces)

    def report() -> QuantizeReport:
        errors = {s.module: _ratio(*squares[s.module]) for s in steps}
        error, norm = (sum(one) for one in zip(*squares.values(), strict=True))
        return QuantizeReport(steps[0].target.describe(), errors, _ratio(error, norm), dense)

    def record() -> dict[str, Any]:
        asked = {"bits": bits, "group_size": group_size, "sym": sym}
        return {"quantizer": {"method": _name(quantizer), **asked, **asdict(report())}}

    execute(
        plan,
        checkpoint,
        target_folder,
        rows=rows,
        progress=progress,
        max_shard=max_shard,
        record=record,
    )
    return report()


def _steps(
    checkpoint: Checkpoint, target: Format, bits: int, group_size: int, sym: bool
) -> tuple[list[Step], tuple[LeftDense, ...]]:
    """Return what to quantize and what stays dense.

    Groups are never longer than the inputs, except that where the target's config names one size
    for the whole model, a linear shorter than it stays dense beside longer ones.
    """
    assert target.capacity is not None
    modules = linears_of(checkpoint)
    shapes = {m: checkpoint.headers[f"{m}.weight"].shape for m in modules}
    widest = max((inp for _, inp in shapes.values()), default=0)
    one_size = target.capacity.uniform and widest > group_size
    steps = []
    left: dict[tuple[str, str], list[str]] = {}
    for module, (out, inp) in shapes.items():
        if not out * inp:
            left.setdefault(("shapes", "there are no weights in them"), []).append(module)
            continue
        size = inp if group_size == -1 else group_size if one_size else min(group_size, inp)
        scheme = Scheme(out, inp, bits, size, sym=sym, scale_dtype=target.capacity.scale_dtypes[0])
        goal = target.adopt(scheme)
        if reason := target.cannot(goal):
            left.setdefault(("shapes", reason), []).append(module)
        else:
            steps.append(Step(module, Verdict.REQUANTIZED, scheme, goal, reason="quantized"))
    for module in dense_linears(dense_modules(checkpoint.headers)):
        if kind := _kept(checkpoint, module):
            left.setdefault((kind, _WHY_KEPT[kind]), []).append(module)
    return steps, tuple(LeftDense(*why, tuple(names)) for why, names in left.items())


def _check_enough(
    checkpoint: Checkpoint,
    target: Format,
    steps: list[Step],
    dense: tuple[LeftDense, ...],
    group_size: int,
    allow_dense: bool,
) -> None:
    """Refuse to quantize nothing, or, unless allowed, to leave half the model for a group size."""
    assert target.capacity is not None
    shapes = [left for left in dense if left.kind == "shapes"]
    if not steps and not shapes:
        raise QplugError(
            "no linear to quantize",
            str(checkpoint.folder),
            fix="choose another --group-size or --to",
        )
    outside = [checkpoint.headers[f"{m}.weight"].shape[1] for x in shapes for m in x.linears]
    widths = [*(step.source.in_features for step in steps), *outside]
    unfit = 0
    if group_size != -1 and not target.capacity.ragged:
        unfit = sum(inp % group_size != 0 for inp in outside)
    if steps and (allow_dense or 2 * unfit <= len(widths)):
        return
    most = max(shapes, key=lambda left: len(left.linears))
    fix = "choose another --group-size or --to"
    if unfit and (fits := fitting(widths, group_size)):
        fix = f"--group-size {fits} fits every linear"
    if steps:
        fix += "; --allow-dense leaves them dense"
    raise QplugError(
        f"{len(outside)} of {len(widths)} linears would stay dense: {most.reason}",
        str(checkpoint.folder),
        fix=fix,
    )


def fitting(widths: Iterable[int], most: int) -> int:
    """Return the largest power of two up to `most` that divides every width, or 0."""
    common = gcd(*widths)
    size = common & -common
    while size > most:
        size //= 2
    return size if size >= _SMALLEST_GROUP else 0


def _ratio(error: float, norm: float) -> float:
    """Return |W - Q| / |W| from the squares."""
    return (error / norm) ** 0.5 if norm else 0.0


def _name(quantizer: Quantizer) -> str:
    """Return what `--method` calls a quantizer."""
    return next((name for name, one in QUANTIZERS.items() if one is quantizer), str(quantizer))


def _stack(pieces: list[QuantizedWeight]) -> QuantizedWeight:
    """Put blocks of output rows of one linear on top of each other."""
    grids = [piece.affine for piece in pieces]
    grid = AffineGrid(
        torch.cat([grid.scales for grid in grids]),
        torch.cat([grid.zeros for grid in grids]),
        grids[0].group_size,
    )
    return QuantizedWeight(torch.cat([p.codes for p in pieces]), pieces[0].bits, grid)
