"""Quantizers: one file an algorithm; weights in, a `QuantizedWeight` out, never a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qplug_converters.block import dense_linears, dense_modules
from qplug_converters.checkpoint import Checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import Progress, execute
from qplug_converters.format import Format
from qplug_converters.formats import dense
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
_KEPT = ("lm_head", "gate", "router", "score", "classifier", "shared_expert_gate")
"""Last components of linears that stay dense: heads, and routers whose errors flip experts."""
_KEPT_TOWERS = ("visual", "vision", "audio", "multi_modal", "mm_projector")


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was quantized and how well.

    `errors` are relative Frobenius errors |W - Q| / |W| per linear; `relative_error` is that of
    all linears together.
    """

    scheme: str
    errors: dict[str, float]
    relative_error: float
    left_dense: tuple[str, ...]

    @property
    def worst(self) -> str:
        """The linear with the largest error."""
        return max(self.errors, key=lambda module: self.errors[module])


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
    return [
        module
        for module in dense_linears(dense_modules(checkpoint.headers))
        if module.rpartition(".")[2] not in _KEPT
        and not any(tower in module for tower in _KEPT_TOWERS)
        and checkpoint.headers[f"{module}.weight"].dtype in FLOATS
    ]


def quantize(
    checkpoint: Checkpoint,
    target_folder: Path,
    target: Format,
    quantizer: Quantizer,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    progress: Progress | None = None,
    max_shard: int = MAX_SHARD,
) -> QuantizeReport:
    """Quantize the linears of a full-precision checkpoint into a new folder.

    A linear whose shape the target cannot hold stays dense and is reported.

    Raises
    ------
    QplugError
        If the target cannot hold the scheme at all, or the checkpoint is no dense one.
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
    steps, left, reasons = [], [], []
    for module in linears_of(checkpoint):
        out, inp = checkpoint.headers[f"{module}.weight"].shape
        size = inp if group_size == -1 else min(group_size, inp)
        scheme = Scheme(out, inp, bits, size, sym=sym, scale_dtype=holds.scale_dtypes[0])
        goal = target.adopt(scheme)
        if reason := target.cannot(goal):
            left.append(module)
            reasons.append(reason)
            continue
        steps.append(Step(module, Verdict.REQUANTIZED, scheme, goal, reason="quantized"))
    if not steps:
        raise QplugError(
            reasons[0] if reasons else "no linear to quantize",
            str(checkpoint.folder),
            fix="choose another --group-size or --to",
        )
    taken = {step.module for step in steps}
    stay = tuple(m for m in dense_modules(checkpoint.headers) if m not in taken)
    model = ModelScheme("dense", {s.module: s.source for s in steps}, stay)
    plan = Plan(dense.FORMAT, target, model, tuple(steps), Wishes(bits=bits))
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

    execute(plan, checkpoint, target_folder, rows=rows, progress=progress, max_shard=max_shard)
    errors = {m: (e / n) ** 0.5 if n else 0.0 for m, (e, n) in squares.items()}
    whole = sum(n for _, n in squares.values())
    relative = (sum(e for e, _ in squares.values()) / whole) ** 0.5 if whole else 0.0
    return QuantizeReport(steps[0].target.describe(), errors, relative, tuple(left))


def _stack(pieces: list[QuantizedWeight]) -> QuantizedWeight:
    """Put blocks of output rows of one linear on top of each other."""
    grids = [piece.grid for piece in pieces]
    grid = AffineGrid(
        torch.cat([grid.scales for grid in grids]),
        torch.cat([grid.zeros for grid in grids]),
        grids[0].group_size,
    )
    return QuantizedWeight(torch.cat([p.codes for p in pieces]), pieces[0].bits, grid)
