"""A shard of the output as a unit of work that knows nothing of its neighbours.

A `ShardJob` is data that can be pickled: where the source's tensors lie, how each linear is stored
before and after, and the file to fill. `run` needs nothing else, so that a shard can be made in
any thread, process or machine that sees the files. Memory is bounded by a block of `BLOCK` codes
for each linear at work, never by a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import moves
from .checkpoint import Checkpoint
from .codec import (
    check_scales,
    constant,
    decode,
    encode,
    implied,
    pack_part,
    translate,
    unpack_part,
)
from .errors import QplugError
from .layout import Holds, Layout, Part, TensorSpec
from .plan import Plan, Step
from .refit import Cost, refit
from .scheme import Scheme
from .shards import Location, Maps
from .threads import alone
from .weight import QuantizedWeight
from .writer import ShardFile, cut

BLOCK = 1 << 24
"""Codes decoded at a time by one thread: at most 8 bytes a code with everything derived, so that
`threads.MOST_WORKERS` stay under 1 GiB."""

Rows = Callable[[Step, int, int], QuantizedWeight]
"""`(step, start, stop)`: output rows of a linear as they are before the step's moves."""
Mapper = Callable[[Callable[["Task"], "Done"], Iterable["Task"]], Iterator["Done"]]
"""`map`, or an executor's."""
Advance = Callable[[int, str], None]
"""`(bytes, what)`: so much more is done."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear to convert: what happens to it, its layouts, and where its source lies.

    `reads` is by part, in the order of the source's files. `order` is the `g_idx` by which the
    output rows are sorted, where the act order of the next linear is absorbed.
    """

    step: Step
    source: Layout
    target: Layout
    reads: Mapping[str, Location]
    zeros: tuple[int, int] = (0, 0)
    order: Location | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor that is carried along as it is.

    Its rows are sorted by `order`, a `g_idx`, if there is one, and filled up with zeros to `rows`.
    """

    name: str
    source: Location
    order: Location | None = None
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a task: bytes written, and what is to be said of a linear."""

    nbytes: int
    module: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


Task = Linear | Copy


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One output file: its path and tensors, and what fills them.

    `hashed` asks for the sha256 of the finished file.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    tasks: tuple[Task, ...]
    hashed: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The source files that it reads."""
        found = (place.file for task in self.tasks for place in _reads(task))
        return tuple(dict.fromkeys(found))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of a shard: the sha256 of the file, where it was asked for, and of each linear."""

    sha256: str | None
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _reads(task: Task) -> list[Location]:
    first = [task.source] if isinstance(task, Copy) else list(task.reads.values())
    return first if task.order is None else [*first, task.order]


def stored_names(layout: Layout, module: str) -> list[str]:
    """Return the names of the tensors of one linear."""
    return [f"{module}.{part.name}" for part in layout]


def tasks_of(plan: Plan, checkpoint: Checkpoint) -> list[tuple[Task, dict[str, TensorSpec]]]:
    """Return what there is to do with the tensors it makes, in the order of the source's files.

    Raises
    ------
    QplugError
        If the target needs the name of a tensor for something else.
    """
    owner: dict[str, Step] = {}
    for step in plan.steps:
        for name in stored_names(plan.source.layout(step.source), step.module):
            owner[name] = step
    g_idx: dict[str, Location] = {}
    for step in plan.steps:
        part = plan.source.layout(step.source).part(Holds.G_IDX)
        if part is not None:
            g_idx[step.module] = checkpoint.locations[f"{step.module}.{part.name}"]
    tasks: list[tuple[Task, dict[str, TensorSpec]]] = []
    order = {name: n for n, name in enumerate(checkpoint.locations)}
    begun = set()
    for name, location in checkpoint.locations.items():
        if name not in owner:
            order_of = plan.reordered.get(name)
            sorted_by = g_idx[order_of] if order_of is not None else None
            rows, spec = plan.padded.get(name, 0), location.spec
            if rows:
                spec = TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
            tasks.append((Copy(name, location, sorted_by, rows), {name: spec}))
            continue
        step = owner[name]
        if step.module in begun:
            continue
        begun.add(step.module)
        source, target = plan.source.layout(step.source), plan.target.layout(step.target)
        names = sorted(stored_names(source, step.module), key=order.__getitem__)
        reads = {n.removeprefix(f"{step.module}."): checkpoint.locations[n] for n in names}
        specs = {}
        for part_name, spec in target.specs(step.target.sizes).items():
            new = f"{step.module}.{part_name}"
            if new in checkpoint.locations and new not in owner:
                raise QplugError(
                    "a tensor that the target needs for something else",
                    new,
                    "no tensor of this name beside a quantized linear",
                )
            specs[new] = spec
        span = (0, 0)
        if plan.target.capacity is not None:
            span = plan.target.capacity.zeros(step.target.bits)
        order_by = g_idx[step.rows_from] if step.rows_from else None
        tasks.append((Linear(step, source, target, reads, span, order_by), specs))
    return tasks


def cut_shards(
    tasks: Iterable[tuple[Task, Mapping[str, TensorSpec]]], most: int
) -> list[tuple[dict[str, TensorSpec], tuple[Task, ...]]]:
    """Cut the output as the source is cut: the tensors and the tasks of each shard.

    A shard takes what begins in one source file, so that it needs that file and those which its
    linears reach into; what would be larger than `most` bytes is cut further, never inside a
    linear.
    """
    by_file: dict[Path, list[tuple[Task, Mapping[str, TensorSpec]]]] = {}
    for task, specs in tasks:
        by_file.setdefault(_reads(task)[0].file, []).append((task, specs))
    shards: list[tuple[dict[str, TensorSpec], tuple[Task, ...]]] = []
    for some in by_file.values():
        left = iter(some)
        for specs in cut((specs for _, specs in some), most):
            mine, made = [], 0
            while made < len(specs):
                task, its = next(left)
                mine.append(task)
                made += len(its)
            shards.append((specs, tuple(mine)))
    return shards


def run(
    job: ShardJob,
    *,
    rows: Rows | None = None,
    mapper: Mapper = map,
    advance: Advance | None = None,
) -> ShardResult:
    """Fill a reserved file and bring it to the disk.

    `rows` supplies the linears where they are made rather than decoded (quantizers).

    Raises
    ------
    QplugError
        If the source is damaged, a value cannot be held, or the disk refuses.
    """
    maps = Maps()
    shard = ShardFile(job.path, job.specs)

    def work(task: Task) -> Done:
        if not isinstance(task, Copy):
            return _convert(task, maps, shard, rows)
        if task.order is not None or task.rows:
            tensor = maps.tensor(task.source)
            if task.order is not None:
                tensor = tensor.index_select(0, moves.column_order(maps.tensor(task.order)))
            more = tensor.new_zeros(max(0, task.rows - len(tensor)), *tensor.shape[1:])
            shard.put(task.name, torch.cat([tensor, more]))
        else:
            shard.copy(task.name, task.source)
        return Done(task.source.spec.nbytes)

    records = {}

    with shard:
        for task, done in zip(job.tasks, mapper(work, job.tasks), strict=True):
            if done.module:
                records[done.module] = done.record
            if advance is not None:
                advance(done.nbytes, task.name if isinstance(task, Copy) else task.step.module)
        shard.sync()
    return ShardResult(shard.sha256() if job.hashed else None, records)


def run_alone(job: ShardJob) -> ShardResult:
    """Run a job on one thread, torch's own off: what an executor is given."""
    with alone():
        return run(job)


# One linear --------------------------------------------------------------------------------------


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
    checkpoint: Checkpoint,
    layout: Layout,
    scheme: Scheme,
    module: str,
    start: int,
    stop: int,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """Decode output rows `start` to `stop` of a linear, or those that stand there in `order`."""
    stored = {part.name: checkpoint.tensor(f"{module}.{part.name}") for part in layout}
    return decode_rows(stored, layout, scheme, module, start, stop, order)


def decode_rows(
    stored: Mapping[str, Tensor],
    layout: Layout,
    scheme: Scheme,
    module: str,
    start: int,
    stop: int,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """Decode output rows `start` to `stop` of the stored tensors of a linear, by part name.

    With `order`, int64 `[out_features]`, the rows that stand there in it.
    """
    sizes = scheme.sizes
    if order is None:
        some = {part.name: rows_of(part, stored[part.name], sizes, start, stop) for part in layout}
    else:
        some = {p.name: _gathered(p, stored[p.name], sizes, order[start:stop]) for p in layout}
    try:
        return decode(layout, replace(scheme, out_features=stop - start), some, start)
    except QplugError as error:
        _place(error, module)
        raise


def _gathered(part: Part, tensor: Tensor, sizes: Mapping[str, int], rows: Tensor) -> Tensor:
    """Return some output rows of a stored tensor, in any order."""
    axis = part.axis("out")
    if axis is None:
        return tensor
    if part.packing is None or part.packed_axis != axis:
        return tensor.index_select(axis, rows)
    held = unpack_part(part, tensor, sizes)  # words along the rows: as a rule, of zeros
    return pack_part(part, held.index_select(0, rows))


def has_codes(layout: Layout) -> bool:
    """Whether a layout holds codes on a grid (dense does not)."""
    return layout.part(Holds.CODES) is not None


def _convert(linear: Linear, maps: Maps, shard: ShardFile, rows: Rows | None) -> Done:
    """Convert one linear; return the bytes written, and what there is to say of it."""
    step, source, target = linear.step, linear.source, linear.target
    stored = {name: maps.tensor(place) for name, place in linear.reads.items()}
    specs = target.specs(step.target.sizes)
    total = sum(spec.nbytes for spec in specs.values())
    blocks = blocks_of(step.source, source, target)
    whole = len(blocks) == 1
    views = {} if whole else {n: shard.view(f"{step.module}.{n}") for n in specs}
    order = None if linear.order is None else moves.column_order(maps.tensor(linear.order))
    untouched = not (step.moves or step.refits or step.padding) and order is None
    cost = Cost()
    try:
        if untouched and has_codes(source) and has_codes(target):
            _convert_parts(linear, stored, shard, blocks, views)
            return Done(total, step.module)
        for start, stop in blocks:
            if rows is not None:
                weight = rows(step, start, stop)
            else:
                weight = decode_rows(stored, source, step.source, step.module, start, stop, order)
            if step.refits and rows is None:
                weight, more = refit(step.target, step.moves, linear.zeros, weight)
                cost += more
            else:
                weight = moves.apply(step.moves, weight)
            if step.padding and stop == step.source.out_features:
                weight = moves.pad_rows(weight, step.padding)
                stop = step.target.out_features
            if whole:
                for name, tensor in encode(target, weight).items():
                    shard.put(f"{step.module}.{name}", tensor)
            else:
                sizes = step.target.sizes
                out = {p.name: rows_of(p, views[p.name], sizes, start, stop) for p in target}
                encode(target, weight, out)
    except QplugError as error:
        _place(error, step.module)
        raise
    return Done(total, step.module, _measured(cost) if cost.weights else {})


def _measured(cost: Cost) -> dict[str, float]:
    """Return what a certificate says of new codes."""
    error, minmax = cost.relative
    return {"relative_error": error, "minmax_relative_error": minmax}


def _convert_parts(
    linear: Linear,
    stored: Mapping[str, Tensor],
    shard: ShardFile,
    blocks: list[tuple[int, int]],
    views: Mapping[str, Tensor],
) -> None:
    """Convert a linear whose numbers stay as they are, each stored tensor on its own.

    A part that is the same in both layouts is copied as bytes.
    """
    step = linear.step
    for part in linear.target:
        name = f"{step.module}.{part.name}"
        if part.holds is Holds.CONSTANT:
            shard.put(name, constant(part))
            continue
        before = linear.source.part(part.holds)
        if before is None:  # a g_idx, or the zeros of a symmetric source
            shard.put(name, pack_part(part, implied(part.holds, step.target)))
            continue
        if part.holds is Holds.SCALES:
            check_scales(stored[before.name])
        if before == part:
            shard.copy(name, linear.reads[before.name])
            continue
        for start, stop in blocks if part.span(step.source.sizes, 0, 1) else blocks[:1]:
            sizes = {**step.source.sizes, "out": stop - start}
            some = rows_of(before, stored[before.name], step.source.sizes, start, stop)
            if views:
                into = rows_of(part, views[part.name], step.target.sizes, start, stop)
                translate(before, part, some, sizes, into)
            else:
                shard.put(name, translate(before, part, some, sizes))


def _place(error: QplugError, module: str) -> None:
    """Say in which linear an error was met, if it does not yet."""
    if not error.where.startswith(module):
        error.where = f"{module}.{error.where}" if error.where else module
