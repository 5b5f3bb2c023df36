"""Carry out a plan: cut it into shards, have each made, and give the folder its name.

A shard is made by `job.run` and knows nothing of the others. The certificate and the config are
written last; the folder gets its name when everything is on the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from pathlib import Path
from typing import Any, Protocol

from . import certificate
from .checkpoint import CERTIFICATE, Checkpoint
from .conversion import Rows
from .errors import QplugError
from .families import widened
from .job import Advance, ShardJob, ShardResult, cut_shards, run, run_alone, tasks_of
from .journal import Journal, Made, key_of
from .plan import Plan
from .threads import workers
from .verdict import Verdict
from .writer import MAX_SHARD, Writer

Progress = Callable[[int, int, str], None]
"""`(bytes done, bytes in all, what)`, called from the thread that called `execute`."""


Deliver = Callable[[Path, str], None]
"""`(file, its sha256)`: a finished shard, to be read, moved or removed before returning."""


class Supply(Protocol):
    """What brings the source's files and takes them away, where they do not all lie there."""

    def need(self, files: Sequence[Path]) -> None:
        """Return when these files are there."""

    def done(self, files: Sequence[Path]) -> None:
        """Take note that these files will not be read again."""


def converted_config(plan: Plan, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and the side files of the converted checkpoint."""
    config = dict(checkpoint.config)
    sides = {n: checkpoint.read_json(n) for n in checkpoint.side_configs}
    if plan.copied_whole and plan.stated is None:
        return config, sides
    config = widened(config, plan.widened)
    text = config.get("text_config")
    if isinstance(text, Mapping) and "quantization_config" in text:
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    if plan.copied_whole and plan.stated is not None:
        config["quantization_config"] = _stating(checkpoint.block or {}, plan.stated)
        return config, {n: _stating(side, plan.stated) for n, side in sides.items()}
    written = plan.target.write(plan.goal)
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    if written.block is not None:
        config["quantization_config"] = dict(written.block)
    else:
        for key in ("dtype", "torch_dtype"):
            if key in config or key == "dtype":
                config[key] = plan.wishes.dtype
    return config, {name: dict(block) for name, block in written.side_files.items()}


def _stating(block: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config block with keys stated otherwise (`None`: left out)."""
    return {k: v for k, v in {**block, **keys}.items() if k not in keys or v is not None}


def conversion_key(plan: Plan, checkpoint: Checkpoint, max_shard: int = MAX_SHARD) -> str:
    """Return the key of a conversion for its journal: source, plan, cutting and version.

    A published source is known by its revision; a folder by when its shards were last written.
    """
    facts = {**certificate.promise(plan, checkpoint), "max_shard": max_shard}
    if not checkpoint.source.origin:
        facts["written"] = [shard.stat().st_mtime_ns for shard in checkpoint.shards]
    return key_of(facts)


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    target: Path,
    *,
    rows: Rows | None = None,
    progress: Progress | None = None,
    max_shard: int = MAX_SHARD,
    record: Callable[[], Mapping[str, Any]] | None = None,
    executor: Executor | None = None,
    supply: Supply | None = None,
    deliver: Deliver | None = None,
    journal: Journal | None = None,
) -> Path:
    """Convert a checkpoint into the new folder `target`.

    Parameters
    ----------
    plan, checkpoint, target
        What to do, with what, and the folder to make.
    rows
        Supplies the linears where they are made rather than decoded (quantizers); not with an
        `executor`.
    progress
        Told of each linear, or with an `executor` of each shard.
    max_shard
        Bytes; shards are cut where the source's are, and further where they would be larger.
    record
        What it returns when all linears are made goes into the certificate.
    executor
        Runs the shards, each on one thread. Without one, shards are made one after another, their
        linears shared among threads.
    supply
        Is asked for the source's files shard by shard, and told when one is done with.
    deliver
        Is given each finished shard, in order. Space is then reserved for one shard at a time, and
        a shard that is gone when it returns is not in `target`, though in its index.
    journal
        Names the shards that need not be made again (in the partial folder, or with `deliver`
        handed over), and takes note of each that is finished. With one, the partial folder stays
        when something goes wrong.

    Raises
    ------
    Refused
        If there is no way for some linear.
    QplugError
        If the source is damaged, a value cannot be held, or the disk refuses. Nothing is left
        behind then, but for what a `journal` is for.
    """
    plan.refuse_above(Verdict.REQUANTIZED)
    if rows is not None and executor is not None:
        raise ValueError("rows are made in this process: not with an executor")
    config, side_files = converted_config(plan, checkpoint)
    others, promised = checkpoint.other_files, certificate.promise(plan, checkpoint)
    shards = cut_shards(tasks_of(plan, checkpoint), max_shard)
    total = sum(spec.nbytes for specs, _ in shards for spec in specs.values())
    done = 0

    def advance(size: int, what: str) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total, what)

    specs = [specs for specs, _ in shards]
    finished = journal.finished.items() if journal is not None else ()
    kept = {name: before.sha256 for name, before in finished}
    with Writer(
        target,
        specs,
        plan.target.shard_stem,
        ahead=deliver is None,
        keep=kept if journal is not None and deliver is None else None,
        resumable=journal is not None,
    ) as writer:
        if journal is not None and deliver is None:
            journal.drop(kept.keys() - writer.kept)
        hashed = deliver is not None or journal is not None
        jobs, files = [], []
        for file, (_, tasks) in zip(writer.shards, shards, strict=True):
            job = ShardJob(file.path, file.specs, tasks, hashed=hashed)
            before = journal.finished.get(file.path.name) if journal is not None else None
            if before is not None:
                advance(job.nbytes, file.path.name)
                certificate.note(promised, before.records)
                continue
            jobs.append(job)
            files.append(file)
        one_by_one = supply is not None or deliver is not None
        last = {file: n for n, job in enumerate(jobs) for file in job.files}

        def begun() -> Iterator[ShardJob]:
            """Yield each job when all that it needs is there."""
            for job, file in zip(jobs, files, strict=True):
                if supply is not None:
                    supply.need(job.files)
                else:
                    checkpoint.source.need([path.name for path in job.files])
                if deliver is not None:
                    file.reserve()
                yield job

        if executor is None:
            results = _here(begun(), rows, advance)
        else:
            results = _there(begun(), executor, one_by_one, advance)
        for n, (job, result) in enumerate(zip(jobs, results, strict=True)):
            certificate.note(promised, result.records)
            if deliver is not None:
                assert result.sha256 is not None
                deliver(job.path, result.sha256)
            if journal is not None:
                assert result.sha256 is not None
                journal.add(job.path.name, Made(result.sha256, files[n].size, result.records))
            if supply is not None:
                supply.done([file for file in job.files if last[file] == n])
        checkpoint.unchanged()
        for path in others:
            writer.file(path)
        for name, block in side_files.items():
            writer.json(name, block)
        writer.json("config.json", config)
        writer.index()
        made = dict(record()) if record is not None else {}
        listed = certificate.files(writer)
        writer.json(CERTIFICATE, certificate.seal({**promised, **made, "files": listed}))
        return writer.commit()


def _here(jobs: Iterator[ShardJob], rows: Rows | None, advance: Advance) -> Iterator[ShardResult]:
    """Make shards one after another, the linears of each shared among threads."""
    with workers() as pool:
        for job in jobs:
            yield run(job, rows=rows, mapper=pool.map, advance=advance)


def _there(
    jobs: Iterator[ShardJob], executor: Executor, one_by_one: bool, advance: Advance
) -> Iterator[ShardResult]:
    """Have shards made by an executor; if one fails, wait for those at work, and drop the rest."""
    waiting: deque[tuple[ShardJob, Future[ShardResult]]] = deque()

    def finished() -> ShardResult:
        job, future = waiting[0]
        result = future.result()
        waiting.popleft()
        advance(job.nbytes, job.path.name)
        return result

    try:
        for job in jobs:
            waiting.append((job, executor.submit(run_alone, job)))
            if one_by_one:
                yield finished()
        while waiting:
            yield finished()
    except BrokenExecutor as error:
        raise QplugError(
            "a worker that died", "the executor", fix="give it more memory, or use fewer workers"
        ) from error
    finally:
        left = [future for _, future in waiting]
        for future in left:
            future.cancel()
        wait(left)
