"""Conversions that are cut short and go on: what is made again, and what is not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import Draft, convert, digest

from qplug_converters import execute as execution
from qplug_converters import formats
from qplug_converters.checkpoint import CERTIFICATE, Checkpoint, open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import Supply, conversion_key, execute
from qplug_converters.job import ShardJob, ShardResult
from qplug_converters.journal import Journal, Made
from qplug_converters.plan import Plan, make_plan
from qplug_converters.survey import survey

SHARDS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Draft.of("gptq-4b-asym-g64").save_sharded(tmp_path / "source", SHARDS)
    return tmp_path / "source"


def planned(source: Path, to: str = "awq") -> tuple[Plan, Checkpoint]:
    checkpoint = open_checkpoint(source)
    found, model = checkpoint.scheme()
    return make_plan(found, survey(checkpoint, found, model), formats.find(to)), checkpoint


class Counted:
    """`job.run`, counted, and failing at the shard of a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.fail_at = 0
        self.run = execution.run
        monkeypatch.setattr(execution, "run", self)

    def __call__(self, job: ShardJob, **more: object) -> ShardResult:
        if len(self.made) + 1 == self.fail_at:
            raise QplugError("no connection", "a test")
        self.made.append(job.path.name)
        return self.run(job, **more)  # type: ignore[arg-type]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def names(*numbers: int) -> list[str]:
    return [f"model-{n:05d}-of-{SHARDS:05d}.safetensors" for n in numbers]


@pytest.mark.parametrize("fail_at", range(1, SHARDS + 1))
def test_it_goes_on_where_it_was(
    fail_at: int, source: Path, tmp_path: Path, counted: Counted
) -> None:
    convert(source, tmp_path / "whole", "awq")
    del counted.made[:]
    plan, checkpoint = planned(source)
    place, key = tmp_path / "journal", conversion_key(plan, checkpoint)
    counted.fail_at = fail_at
    with pytest.raises(QplugError, match="no connection"):
        execute(plan, checkpoint, tmp_path / "out", journal=Journal(place, key))
    assert counted.made == names(*range(1, fail_at))
    assert not (tmp_path / "out").exists()
    counted.fail_at = 0
    del counted.made[:]
    told: list[tuple[int, int]] = []
    execute(
        plan,
        checkpoint,
        tmp_path / "out",
        journal=Journal(place, key),
        progress=lambda done, total, what: told.append((done, total)),
    )
    assert counted.made == names(*range(fail_at, SHARDS + 1))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert told[-1][0] == told[-1][1]


def test_what_was_measured_is_remembered(tmp_path: Path, counted: Counted) -> None:
    """Errors of requantized linears, in the certificate, of shards made before the interruption."""
    source = tmp_path / "source"
    Draft.of("gptq-4b-sym-g64-actorder").save_sharded(source, SHARDS)
    convert(source, tmp_path / "whole", "awq")
    certificate = json.loads((tmp_path / "whole" / CERTIFICATE).read_text())
    assert "REQUANTIZED" in {one["verdict"] for one in certificate["linears"].values()}
    plan, checkpoint = planned(source)
    key = conversion_key(plan, checkpoint)
    del counted.made[:]
    counted.fail_at = SHARDS
    with pytest.raises(QplugError):
        execute(plan, checkpoint, tmp_path / "out", journal=Journal(tmp_path / "journal", key))
    counted.fail_at = 0
    execute(plan, checkpoint, tmp_path / "out", journal=Journal(tmp_path / "journal", key))
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text()) == certificate


def test_shards_that_were_spoilt_are_made_again(
    source: Path, tmp_path: Path, counted: Counted
) -> None:
    """By their hash, not by their name; what else lies there goes."""
    plan, checkpoint = planned(source)
    place, key = tmp_path / "journal", conversion_key(plan, checkpoint)
    convert(source, tmp_path / "whole", "awq")
    del counted.made[:]
    counted.fail_at = 4
    with pytest.raises(QplugError):
        execute(plan, checkpoint, tmp_path / "out", journal=Journal(place, key))
    partial = tmp_path / ".out.qplug-partial"
    first, second, third = (partial / name for name in names(1, 2, 3))
    first.write_bytes(b"\1" + first.read_bytes()[1:])
    second.unlink()
    (partial / "model-00009-of-00009.safetensors").write_bytes(b"old")
    assert third.exists()
    counted.fail_at = 0
    del counted.made[:]
    execute(plan, checkpoint, tmp_path / "out", journal=Journal(place, key))
    assert counted.made == names(1, 2, 4)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_another_conversion_does_not_go_on(source: Path, tmp_path: Path, counted: Counted) -> None:
    plan, checkpoint = planned(source)
    counted.fail_at = 3
    with pytest.raises(QplugError):
        execute(
            plan,
            checkpoint,
            tmp_path / "out",
            journal=Journal(tmp_path / "journal", conversion_key(plan, checkpoint)),
        )
    other, _ = planned(source, "canonical")
    key = conversion_key(other, checkpoint)
    assert key != conversion_key(plan, checkpoint)
    assert key != conversion_key(other, checkpoint, 1000)
    os.utime(checkpoint.shards[-1], ns=(0, 0))
    assert key != conversion_key(other, checkpoint)
    other, checkpoint = planned(source, "canonical")
    counted.fail_at = 0
    del counted.made[:]
    journal = Journal(tmp_path / "journal", key)
    assert journal.finished == {}
    execute(other, checkpoint, tmp_path / "out", journal=journal)
    assert len(counted.made) == SHARDS
    convert(source, tmp_path / "whole", "canonical")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


class Bounded:
    """A supply that counts what is there, and a delivery that takes shards away."""

    def __init__(self) -> None:
        self.here: set[str] = set()
        self.most = 0
        self.delivered: dict[str, str] = {}

    def need(self, files: Sequence[Path]) -> None:
        self.here |= {file.name for file in files}
        self.most = max(self.most, len(self.here))

    def done(self, files: Sequence[Path]) -> None:
        self.here -= {file.name for file in files}

    def deliver(self, path: Path, sha256: str) -> None:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        self.delivered[path.name] = sha256
        path.unlink()


def test_delivered_shards_are_not_made_again(
    source: Path, tmp_path: Path, counted: Counted
) -> None:
    """Nor is anything of the source asked for that only they need."""
    convert(source, tmp_path / "whole", "awq")
    whole = digest(tmp_path / "whole")
    del counted.made[:]
    plan, checkpoint = planned(source)
    key = conversion_key(plan, checkpoint)
    bounded = Bounded()
    supply: Supply = bounded
    counted.fail_at = 3
    with pytest.raises(QplugError):
        execute(
            plan,
            checkpoint,
            tmp_path / "out",
            supply=supply,
            deliver=bounded.deliver,
            journal=Journal(tmp_path / "journal", key),
        )
    assert list(bounded.delivered) == names(1, 2)
    again = Bounded()
    counted.fail_at = 0
    journal = Journal(tmp_path / "journal", key)
    execute(
        plan, checkpoint, tmp_path / "out", supply=again, deliver=again.deliver, journal=journal
    )
    assert list(again.delivered) == names(3, 4)
    assert again.most <= 2
    assert again.here == set()
    made = bounded.delivered | again.delivered
    assert {name: made.get(name, h) for name, h in whole.items()} == whole
    assert {n: m.sha256 for n, m in journal.finished.items()} == made
    left = digest(tmp_path / "out")
    assert left == {name: h for name, h in whole.items() if name not in made}


def test_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    journal = Journal(path, "key")
    journal.add("a", Made("0", 1))
    journal.add("b", Made("1", 2))
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, "key")
    assert again.finished == {"a": Made("0", 1)}
    again.add("c", Made("2", 3))
    assert list(Journal(path, "key").finished) == ["a", "c"]
    path.write_bytes(b'\xff\n{"name": 5}\n')
    assert Journal(path, "key").finished == {}
    assert Journal(path, "other").finished == {}


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(QplugError) as refused:
        Journal(tmp_path / "file" / "journal", "key")
    assert refused.value.where == str(tmp_path / "file" / "journal")
