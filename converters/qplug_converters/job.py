"""A shard of the output as a unit of work that knows nothing of its neighbours.

A `ShardJob` is data that can be pickled: where the source's tensors lie, how each linear is stored
before and after, and the file to fill. `run` needs nothing else, so that a shard can be made in
any thread, process or machine that sees the files. Memory is bounded by a block of `BLOCK` codes
for each linear at work, never by a linear.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from . import moves
from .blocks import stored_names
from .checkpoint import Checkpoint
from .conversion import Conversion, Linear, Rows, Scratch
from .digest import bytes_of
from .errors import QplugError
from .layout import Holds, TensorSpec
from .plan import Plan, Step
from .shards import Location, Maps
from .threads import MOST_WORKERS, alone
from .writer import ShardFile, cut

Mapper = Callable[[Callable[["Task"], "Done"], Iterable["Task"]], Iterator["Done"]]
"""`map`, or an executor's."""
Advance = Callable[[int, str], None]
"""`(bytes, what)`: so much more is done."""


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
    """What came of a task: what the certificate says of a linear or of a tensor carried along."""

    name: str
    nbytes: int
    record: Mapping[str, Any]


Task = Linear | Copy

SMALL = 1 << 20
"""Bytes of a task's source below which it is not worth a thread of its own: most of its work is
Python's, and two threads that take turns at that are slower than one (0.37 s against 0.28 s for a
model of 135 M weights)."""


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
    """What came of a shard: the sha256 of the file, where it was asked for, and of each task.

    `records` is what the certificate says of a linear (by module) or of a tensor carried along.
    """

    sha256: str | None
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _size(task: Task) -> int:
    """Return the bytes of what a task reads."""
    return sum(place.spec.nbytes for place in _reads(task))


def _reads(task: Task) -> list[Location]:
    first = [task.source] if isinstance(task, Copy) else list(task.reads.values())
    return first if task.order is None else [*first, task.order]


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
            for new in plan.renamed.get(name, (name,)):
                tasks.append((Copy(new, location, sorted_by, rows), {new: spec}))
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
            new = f"{step.written}.{part_name}"
            if new in checkpoint.locations and new not in owner and new not in plan.renamed:
                raise QplugError(
                    "a tensor that the target needs for something else",
                    new,
                    "no tensor of this name beside a quantized linear",
                    "rename it, or choose another target",
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
    local = threading.local()  # scratch is a thread's own
    threads = min(torch.get_num_threads(), MOST_WORKERS)

    def work(task: Task) -> Done:
        if isinstance(task, Copy):
            return _copy(task, maps, shard)
        if not hasattr(local, "scratch"):
            local.scratch = Scratch(threads)
        record = Conversion(task, maps, shard, local.scratch, rows).run()
        size = sum(spec.nbytes for spec in task.target.specs(task.step.target.sizes).values())
        return Done(task.step.module, size, record)

    # The largest first, so that no thread is left with much when the others are done.
    sized = sorted(((_size(task), task) for task in job.tasks), key=lambda pair: -pair[0])
    small = [task for size, task in sized if size < SMALL]
    records: dict[str, Mapping[str, Any]] = {}
    with shard:
        with shard.syncing():
            large = mapper(work, [task for _, task in sized[: len(sized) - len(small)]])
            with alone():
                for done in chain(map(work, small), large):
                    records[done.name] = done.record
                    if advance is not None:
                        advance(done.nbytes, done.name)
        shard.sync()
    return ShardResult(shard.sha256() if job.hashed else None, records)


def _copy(task: Copy, maps: Maps, shard: ShardFile) -> Done:
    """Carry a tensor along."""
    size = task.source.spec.nbytes
    if task.order is None and not task.rows:
        shard.copy(task.name, task.source)
        return Done(task.name, size, {"blake3": blake3(maps.raw(task.source)).hexdigest()})
    tensor = maps.tensor(task.source)
    if task.order is not None:
        tensor = tensor.index_select(0, moves.column_order(maps.tensor(task.order)))
    more = tensor.new_zeros(max(0, task.rows - len(tensor)), *tensor.shape[1:])
    tensor = torch.cat([tensor, more])
    shard.put(task.name, tensor)
    return Done(task.name, size, {"blake3": blake3(bytes_of(tensor)).hexdigest()})


def run_alone(job: ShardJob) -> ShardResult:
    """Run a job on one thread, torch's own off: what an executor is given."""
    with alone():
        return run(job)
