"""Carry out a plan: read parts, decode, move, encode, write, one block of rows at a time.

Memory is bounded by a block of `BLOCK` codes, never by a linear. The certificate and the config
are written last; the folder gets its name when everything is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import moves
from .checkpoint import Checkpoint
from .codec import check_scales, constant, decode, encode, translate
from .errors import QplugError
from .layout import Holds, Layout, Part, TensorSpec
from .plan import Plan, Step
from .scheme import Scheme
from .threads import workers
from .version import __version__
from .weight import QuantizedWeight
from .writer import MAX_SHARD, Writer

BLOCK = 1 << 24
"""Codes decoded at a time by one thread: at most 8 bytes a code with everything derived, so that
`threads.MOST_WORKERS` stay under 1 GiB."""

CERTIFICATE = "qplug-certificate.json"

Progress = Callable[[int, int, str], None]
"""`(bytes done, bytes in all, what)`, called from the thread that called `execute`."""


def stored_names(layout: Layout, module: str) -> list[str]:
    """Return the names of the tensors of one linear."""
    return [f"{module}.{part.name}" for part in layout]


def output_specs(plan: Plan, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Return every tensor of the converted checkpoint, in the order of the source's files."""
    specs: dict[str, TensorSpec] = {}
    owner: dict[str, Step] = {}
    for step in plan.steps:
        for name in stored_names(plan.source.layout(step.source), step.module):
            owner[name] = step
    written = set()
    for name, spec in checkpoint.headers.items():
        if name not in owner:
            specs[name] = spec
            continue
        step = owner[name]
        if step.module in written:
            continue
        written.add(step.module)
        for part, target in plan.target.layout(step.target).specs(step.target.sizes).items():
            new = f"{step.module}.{part}"
            if new in checkpoint.headers and new not in owner:
                raise QplugError(
                    "a tensor that the target needs for something else",
                    new,
                    "no tensor of this name beside a quantized linear",
                )
            specs[new] = target
    return specs


def rows_of(part: Part, tensor: Tensor, sizes: Mapping[str, int], start: int, stop: int) -> Tensor:
    """Return output rows `start` to `stop` of a stored tensor as a view; `sizes` of the whole."""
    span = part.span(sizes, start, stop)
    return tensor if span is None else tensor.narrow(*span)


def blocks_of(scheme: Scheme, *layouts: Layout, most: int = BLOCK) -> list[tuple[int, int]]:
    """Cut the output rows into blocks of at most `most` codes that cut no word of any layout."""
    step = lcm(*(layout.row_step(scheme.sizes) for layout in layouts))
    rows = max(step, most // scheme.in_features // step * step)
    return [(at, min(at + rows, scheme.out_features)) for at in range(0, scheme.out_features, rows)]


def read_rows(
    checkpoint: Checkpoint, layout: Layout, scheme: Scheme, module: str, start: int, stop: int
) -> QuantizedWeight:
    """Decode output rows `start` to `stop` of a linear."""
    stored = {
        part.name: rows_of(
            part, checkpoint.tensor(f"{module}.{part.name}"), scheme.sizes, start, stop
        )
        for part in layout
    }
    try:
        return decode(layout, replace(scheme, out_features=stop - start), stored, start)
    except QplugError as error:
        _place(error, module)
        raise


Rows = Callable[[Step, int, int], QuantizedWeight]
"""`(step, start, stop)`: output rows of a linear as they are before the step's moves."""


def _convert(plan: Plan, checkpoint: Checkpoint, writer: Writer, step: Step, read: Rows) -> int:
    """Convert one linear; return the bytes written."""
    source, target = plan.source.layout(step.source), plan.target.layout(step.target)
    specs = target.specs(step.target.sizes)
    total = sum(spec.nbytes for spec in specs.values())
    blocks = blocks_of(step.source, source, target)
    whole = len(blocks) == 1
    views = {} if whole else {n: writer.view(f"{step.module}.{n}") for n in specs}
    try:
        if not step.moves and has_codes(source) and has_codes(target):
            _convert_parts(checkpoint, writer, step, source, target, blocks, views)
            return total
        for start, stop in blocks:
            weight = moves.apply(step.moves, read(step, start, stop))
            if whole:
                for name, tensor in encode(target, weight).items():
                    writer.put(f"{step.module}.{name}", tensor)
            else:
                sizes = step.target.sizes
                out = {p.name: rows_of(p, views[p.name], sizes, start, stop) for p in target}
                encode(target, weight, out)
    except QplugError as error:
        _place(error, step.module)
        raise
    return total


def _convert_parts(
    checkpoint: Checkpoint,
    writer: Writer,
    step: Step,
    source: Layout,
    target: Layout,
    blocks: list[tuple[int, int]],
    views: Mapping[str, Tensor],
) -> None:
    """Convert a linear whose numbers stay as they are, each stored tensor on its own.

    A part that is the same in both layouts is copied as bytes.
    """
    for part in target:
        name = f"{step.module}.{part.name}"
        if part.holds is Holds.CONSTANT:
            writer.put(name, constant(part))
            continue
        before = source.part(part.holds)
        if before is None:  # only a g_idx can be asked for that the source does without
            groups = torch.arange(step.target.in_features, dtype=torch.int32)
            writer.put(name, groups // step.target.group_size)
            continue
        stored_as = f"{step.module}.{before.name}"
        if part.holds is Holds.SCALES:
            check_scales(checkpoint.tensor(stored_as))
        if before == part:
            writer.copy(name, checkpoint.locations[stored_as])
            continue
        stored = checkpoint.tensor(stored_as)
        for start, stop in blocks if part.span(step.source.sizes, 0, 1) else blocks[:1]:
            sizes = {**step.source.sizes, "out": stop - start}
            rows = rows_of(before, stored, step.source.sizes, start, stop)
            if views:
                into = rows_of(part, views[part.name], step.target.sizes, start, stop)
                translate(before, part, rows, sizes, into)
            else:
                writer.put(name, translate(before, part, rows, sizes))


def _place(error: QplugError, module: str) -> None:
    """Say in which linear an error was met, if it does not yet."""
    if not error.where.startswith(module):
        error.where = f"{module}.{error.where}" if error.where else module


def converted_config(plan: Plan, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and the side files of the converted checkpoint."""
    config = dict(checkpoint.config)
    if plan.copied_whole:
        return config, {n: checkpoint.read_json(n) for n in checkpoint.side_configs}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "quantization_config" in text:
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    written = plan.target.write(plan.goal)
    config.pop("quantization_config", None)
    if written.block is not None:
        config["quantization_config"] = dict(written.block)
    else:
        for key in ("dtype", "torch_dtype"):
            if key in config or key == "dtype":
                config[key] = plan.wishes.dtype
    return config, {name: dict(block) for name, block in written.side_files.items()}


def certificate(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the plan promises of every linear, as `qplug-certificate.json` holds it."""
    return {
        "tool": f"qplug {__version__}",
        "source": {
            "format": plan.source.name,
            "producer": plan.model.producer,
            "files": {s.name: checkpoint.source.size(s.name) for s in checkpoint.shards},
            "notes": list(plan.model.notes),
        },
        "target": plan.target.name,
        "verdict": plan.verdict.name,
        "linears": {step.module: step.as_json() for step in plan.steps},
    }


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    target: Path,
    *,
    rows: Rows | None = None,
    progress: Progress | None = None,
    max_shard: int = MAX_SHARD,
    record: Callable[[], Mapping[str, Any]] | None = None,
) -> Path:
    """Convert a checkpoint into the new folder `target`.

    `rows` supplies the linears where they are made rather than decoded (quantizers); what `record`
    returns when all are made goes into the certificate.

    Raises
    ------
    QplugError
        If the source is damaged, a value cannot be held, or the disk refuses. Nothing is left
        behind then.
    """

    def decoded(step: Step, start: int, stop: int) -> QuantizedWeight:
        layout = plan.source.layout(step.source)
        return read_rows(checkpoint, layout, step.source, step.module, start, stop)

    read = rows or decoded
    config, side_files = converted_config(plan, checkpoint)
    others = checkpoint.other_files
    specs = output_specs(plan, checkpoint)
    total = sum(spec.nbytes for spec in specs.values())
    touched = {
        name for s in plan.steps for name in stored_names(plan.source.layout(s.source), s.module)
    }
    done = 0

    def advance(size: int, what: str) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total, what)

    with Writer(target, specs, plan.target.shard_stem, max_shard) as writer:
        with workers() as pool:
            sizes = pool.map(lambda s: _convert(plan, checkpoint, writer, s, read), plan.steps)
            for step, size in zip(plan.steps, sizes, strict=True):
                advance(size, step.module)
        for name, spec in checkpoint.headers.items():
            if name not in touched:
                writer.copy(name, checkpoint.locations[name])
                advance(spec.nbytes, name)
        for path in others:
            writer.file(path)
        for name, block in side_files.items():
            writer.json(name, block)
        writer.json("config.json", config)
        made = dict(record()) if record is not None else {}
        writer.json(CERTIFICATE, certificate(plan, checkpoint) | made)
        return writer.commit()


def has_codes(layout: Layout) -> bool:
    """Whether a layout holds codes on a grid (dense does not)."""
    return layout.part(Holds.CODES) is not None
