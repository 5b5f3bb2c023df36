"""Shards as units of work: cut as the source is, made anywhere, supplied and delivered singly."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from builders import GOLDEN, Draft, convert, dense, digest

from qplug.quantizers import QUANTIZERS, quantize
from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.job import Copy, ShardJob, cut_shards, run_alone, tasks_of
from qplug_converters.layout import TensorSpec
from qplug_converters.plan import Plan, make_plan
from qplug_converters.shards import Location, read_header
from qplug_converters.survey import survey
from qplug_converters.verify import verify

GPTQ = "gptq-4b-asym-g64"


def planned(folder: Path, to: str) -> Plan:
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    return make_plan(found, survey(checkpoint, found, model), formats.find(to))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a checkpoint of three shards that cut linears in two."""
    Draft.of(GPTQ).save_sharded(tmp_path / "source", 3)
    return tmp_path / "source"


def weights(folder: Path) -> dict[str, str]:
    return {k: v for k, v in digest(folder).items() if k.endswith(".safetensors")}


# Cutting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["awq", "canonical", "dense"])
def test_a_shard_needs_its_file_and_those_its_linears_reach_into(source: Path, to: str) -> None:
    checkpoint = open_checkpoint(source)
    tasks = tasks_of(planned(source, to), checkpoint)
    shards = cut_shards(tasks, 1 << 40)
    assert len(shards) == 3
    for file, (specs, mine) in zip(checkpoint.shards, shards, strict=True):
        job = ShardJob(source / "x", specs, mine)
        assert job.files[0] == file
        assert len(job.files) <= 2
        named = {t.name if isinstance(t, Copy) else t.step.module for t in mine}
        assert {n if n in named else n.rpartition(".")[0] for n in specs} == named
    assert sum(len(mine) for _, mine in shards) == len(tasks)
    assert [n for specs, _ in shards for n in specs] == [n for _, specs in tasks for n in specs]


@pytest.mark.parametrize("most", [1, 5_000, 20_000])
def test_what_is_too_large_is_cut_further_and_never_inside_a_linear(
    source: Path, most: int
) -> None:
    tasks = tasks_of(planned(source, "awq"), open_checkpoint(source))
    shards = cut_shards(tasks, most)
    assert len(shards) > 3
    for specs, mine in shards:
        assert sum(spec.nbytes for spec in specs.values()) <= most or len(mine) == 1
    assert [task for _, mine in shards for task in mine] == [task for task, _ in tasks]


def test_one_source_file_is_no_reason_for_many(tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "out", "awq")
    assert list(weights(tmp_path / "out")) == ["model.safetensors"]


# Executors ---------------------------------------------------------------------------------------


class Elsewhere(Executor):
    """Sends jobs and results as bytes, as a cluster would, and runs them at the very end."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def submit(self, function, /, *args, **more):  # type: ignore[no-untyped-def]
        self.sent.append(pickle.dumps((function, args, more)))
        sent = self.sent[-1]

        class Later(Future):  # type: ignore[type-arg]
            def result(self, timeout: float | None = None) -> object:
                called, given, named = pickle.loads(sent)
                self.set_result(pickle.loads(pickle.dumps(called(*given, **named))))
                return super().result()

        return Later()


@pytest.fixture(scope="module")
def spawned() -> ProcessPoolExecutor:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("to", ["awq", "canonical", "dense"])
@pytest.mark.parametrize("kind", ["threads", "processes", "elsewhere"])
def test_any_executor_makes_the_same_bytes(
    kind: str, to: str, source: Path, tmp_path: Path, spawned: ProcessPoolExecutor
) -> None:
    convert(source, tmp_path / "here", to)
    seen: list[tuple[int, int, str]] = []
    executor = {"threads": ThreadPoolExecutor(2), "processes": spawned, "elsewhere": Elsewhere()}
    with_it = executor[kind]
    convert(source, tmp_path / "there", to, lambda *now: seen.append(now), executor=with_it)
    if kind == "threads":
        with_it.shutdown()
    assert digest(tmp_path / "there") == digest(tmp_path / "here")
    assert [what for _, _, what in seen] == sorted(weights(tmp_path / "there"))
    assert seen[-1][0] == seen[-1][1]


def test_an_error_in_another_process(source: Path, tmp_path: Path, spawned: Executor) -> None:
    """It comes back whole, and nothing is left behind."""
    checkpoint = open_checkpoint(source)
    place = checkpoint.locations["model.layers.0.mlp.down_proj.scales"]
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x00\x7c")
    with pytest.raises(QplugError, match="NaN or infinite") as caught:
        convert(source, tmp_path / "out", "awq", executor=spawned)
    assert caught.value.where == "model.layers.0.mlp.down_proj.scales"
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def die(job: ShardJob) -> None:
    os._exit(9)


def test_a_worker_that_dies(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qplug_converters import execute

    monkeypatch.setattr(execute, "run_alone", die)
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        pytest.raises(QplugError, match="a worker that died"),
    ):
        convert(source, tmp_path / "out", "awq", executor=pool)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_quantizers_stay_in_this_process(tmp_path: Path) -> None:
    source = dense().save(tmp_path / "dense")
    quantize(
        open_checkpoint(source), tmp_path / "out", formats.find("gptq"), QUANTIZERS["rtn"],
        bits=4, group_size=32, sym=False, max_shard=5000,
    )  # fmt: skip
    from qplug_converters.execute import execute

    with pytest.raises(ValueError, match="not with an executor"):
        execute(
            planned(tmp_path / "out", "awq"), open_checkpoint(tmp_path / "out"), tmp_path / "x",
            rows=lambda *_: None, executor=Elsewhere(),
        )  # fmt: skip


# Supply and delivery -----------------------------------------------------------------------------


class Store:
    """Brings files of a hidden folder when they are needed, and removes them when done."""

    def __init__(self, hidden: Path, folder: Path) -> None:
        self.hidden, self.folder = hidden, folder
        self.most, self.trace = 0, list[str]()

    def there(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def need(self, files: Sequence[Path]) -> None:
        for file in files:
            if not file.exists():
                shutil.copyfile(self.hidden / file.name, file)
                self.trace.append(f"need {file.name[:11]}")
        self.most = max(self.most, len(self.there()))

    def done(self, files: Sequence[Path]) -> None:
        for file in files:
            file.unlink()
            self.trace.append(f"done {file.name[:11]}")


@pytest.mark.parametrize("to", ["awq", "dense"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_streaming_holds_two_files_of_the_source_and_one_of_the_output(
    source: Path, to: str, elsewhere: bool, tmp_path: Path
) -> None:
    convert(source, tmp_path / "whole", to)
    before = digest(source)
    checkpoint, plan = open_checkpoint(source), planned(source, to)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    sizes = {name: checkpoint.source.size(name) for name in checkpoint.model_names}
    for file in checkpoint.shards:
        file.rename(hidden / file.name)
    checkpoint.source.size = sizes.__getitem__  # type: ignore[method-assign]
    store = Store(hidden, source)
    delivered: dict[str, str] = {}

    def deliver(path: Path, sha256: str) -> None:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        assert [p.name for p in path.parent.glob("*.safetensors")] == [path.name]
        read_header(path)
        delivered[path.name] = sha256
        path.unlink()

    from qplug_converters.execute import execute

    execute(
        plan, checkpoint, tmp_path / "out",
        supply=store, deliver=deliver, executor=Elsewhere() if elsewhere else None,
    )  # fmt: skip
    assert store.most == 2
    assert store.there() == []
    assert store.trace == [
        "need model-00001", "need model-00002", "done model-00001",
        "need model-00003", "done model-00002", "done model-00003",
    ]  # fmt: skip
    assert delivered == weights(tmp_path / "whole")
    assert list(delivered) == sorted(delivered)
    rest = digest(tmp_path / "out")
    assert weights(tmp_path / "out") == {}
    assert {**rest, **delivered} == digest(tmp_path / "whole")
    store.need([source / name for name in before if name.endswith(".safetensors")])
    assert digest(source) == before


def test_a_delivery_that_is_refused(source: Path, tmp_path: Path) -> None:
    def deliver(path: Path, sha256: str) -> None:
        raise QplugError("no way through", "the network", fix="try again")

    with pytest.raises(QplugError, match="no way through"):
        convert(source, tmp_path / "out", "awq", deliver=deliver)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_is_delivered_and_left_is_in_the_folder(source: Path, tmp_path: Path) -> None:
    seen = []
    convert(source, tmp_path / "out", "awq", deliver=lambda path, _: seen.append(path.name))
    assert sorted(weights(tmp_path / "out")) == seen
    assert verify(open_checkpoint(source), open_checkpoint(tmp_path / "out")).same


def test_a_job_is_data(source: Path, tmp_path: Path) -> None:
    """What reads the job knows no plan, no checkpoint and no format."""
    place = Location(source / "config.json", 0, TensorSpec("U8", (8,)))
    job = ShardJob(tmp_path / "x", {"a": place.spec}, (Copy("a", place),), hashed=True)
    from qplug_converters.writer import ShardFile

    ShardFile(job.path, job.specs).reserve()
    result = run_alone(pickle.loads(pickle.dumps(job)))
    assert result.sha256 == hashlib.sha256(job.path.read_bytes()).hexdigest()
    assert job.path.read_bytes()[-8:] == (source / "config.json").read_bytes()[:8]
