"""The writer: a target appears when it is whole, or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import GOLDEN, Draft, convert, digest

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.verify import verify
from qplug_converters.writer import Writer

GPTQ, SYM, AWQ = "gptq-4b-asym-g64", "gptq-4b-sym-g128", "awq-gemm-g128"
SHARD = "model.safetensors"


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "link"])
def test_target_that_exists(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    if kind == "folder":
        Draft.of(AWQ).save(target)
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(other)
        if kind == "link":
            other.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QplugError, match="exists") as caught:
        convert(GOLDEN / GPTQ, target)
    assert str(target) in caught.value.where
    assert caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def appear(done: int, total: int, what: str) -> None:
        target.mkdir(exist_ok=True)

    with pytest.raises(QplugError, match="meanwhile"):
        convert(GOLDEN / GPTQ, target, progress=appear)
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == []


def test_target_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QplugError, match=r"[Nn]ot a directory|File exists") as caught:
        convert(GOLDEN / GPTQ, tmp_path / "file" / "target")
    assert caught.value.where
    assert caught.value.fix


def test_target_that_may_not_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(QplugError, match="Permission denied"):
        convert(GOLDEN / GPTQ, closed / "target")
    assert list(closed.iterdir()) == []


def test_parents_are_made_and_taken_back(tmp_path: Path) -> None:
    convert(GOLDEN / GPTQ, tmp_path / "a" / "b" / "target")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["target"]
    (tmp_path / "kept").mkdir()

    def stop(done: int, total: int, what: str) -> None:
        raise QplugError("enough", "here", fix="rest")

    with pytest.raises(QplugError, match="enough"):
        convert(GOLDEN / GPTQ, tmp_path / "kept" / "x" / "y" / "target", progress=stop)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    """In a folder that others may write to, it could lead to anything."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / ".target.qplug-partial").symlink_to(tmp_path / "precious")
    with pytest.raises(QplugError):
        convert(GOLDEN / GPTQ, tmp_path / "target")
    assert (tmp_path / "precious" / "file").read_text() == "mine"


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the size of files this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_shard_over_the_file_size_limit(tmp_path: Path, file_limit: Callable[[int], None]) -> None:
    file_limit(50_000)
    with pytest.raises(QplugError, match="File too large") as caught:
        convert(GOLDEN / GPTQ, tmp_path / "target")
    file_limit(resource.RLIM_INFINITY)
    assert caught.value.where
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_limit_hit_in_the_middle(
    name: str, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    """The shards fit; what is copied and written after them does not."""
    draft = Draft.of(GPTQ)
    if name == "config.json":
        draft.config["padding"] = "x" * 300_000
    else:
        draft.files[name] = b"x" * 300_000
    source = draft.save(tmp_path / "source")
    file_limit(250_000)
    with pytest.raises(QplugError, match="File too large") as caught:
        convert(source, tmp_path / "target", max_shard=60_000)
    file_limit(resource.RLIM_INFINITY)
    assert name in caught.value.where
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_two_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    refused = []

    def second(done: int, total: int, what: str) -> None:
        with pytest.raises(QplugError, match="another conversion at work") as caught:
            convert(GOLDEN / SYM, target)
        refused.append(caught.value)

    convert(GOLDEN / GPTQ, target, progress=second)
    assert refused
    assert all(error.where and error.fix for error in refused)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    convert(GOLDEN / GPTQ, tmp_path / "alone")
    assert digest(target) == digest(tmp_path / "alone")


def test_one_that_waited_while_the_other_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is on a folder that may have been renamed, or removed, before it was got."""
    target = tmp_path / "target"
    real = os.open
    raced = []

    def slow(path: object, flags: int, *more: object, **named: object) -> int:
        found = real(path, flags, *more, **named)  # type: ignore[arg-type]
        if str(path).endswith(".qplug-partial") and not raced:
            raced.append(path)
            convert(GOLDEN / SYM, target)
        return found

    monkeypatch.setattr(os, "open", slow)
    with pytest.raises(QplugError, match="exists"):
        convert(GOLDEN / GPTQ, target)
    assert raced
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert verify(open_checkpoint(GOLDEN / SYM), open_checkpoint(target)).same


def test_leftovers_are_cleared(tmp_path: Path) -> None:
    partial = tmp_path / ".target.qplug-partial"
    (partial / "deep").mkdir(parents=True)
    (partial / "qplug-00001-of-00001.safetensors").write_text("half")
    convert(GOLDEN / GPTQ, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert not (tmp_path / "target" / "deep").exists()


def test_source_that_becomes_shorter(tmp_path: Path) -> None:
    source = Draft.of(GPTQ).save(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    place = checkpoint.locations["model.norm.weight"]
    writer = Writer(tmp_path / "target", [{"x": place.spec}])
    os.truncate(source / SHARD, place.offset + 8)
    with writer, writer.shards[0] as shard, pytest.raises(QplugError, match="became shorter"):
        shard.copy("x", place)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# Interrupted -------------------------------------------------------------------------------------

CHILD = textwrap.dedent(
    """
    import signal, sys, time
    from qplug_converters import writer
    import qplug.cli

    # A test run started in the background has SIGINT ignored, and hands that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def pause(self, *ignored):
        # In the middle: some tensors are written, others are not.
        sys.stdout.write("ready\\n")  # in one piece: several threads may come here
        sys.stdout.flush()
        time.sleep(2)

    writer.ShardFile.copy = pause
    qplug.cli.main(sys.argv[1:])
    """
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_interrupted_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    source = tmp_path / "source"
    Draft.of(GPTQ).save_sharded(source)
    before = digest(source)
    target = tmp_path / "out" / "target"
    target.parent.mkdir()
    command = [sys.executable, "-c", CHILD, "convert", str(source), str(target)]
    child = subprocess.Popen(
        [*command, "--to", "canonical"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) and line != "ready\n":
        pass
    assert line, child.communicate()
    (partial,) = target.parent.iterdir()
    assert partial.name == ".target.qplug-partial"
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert digest(source) == before
    assert not target.exists()
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        # What is left has no config, so no tool takes it for a model.
        with pytest.raises(QplugError, match="no such file"):
            open_checkpoint(partial)
    else:
        assert child.returncode == 130
        assert said.splitlines()[-1] == "warning: interrupted; nothing was left behind"
        assert "Traceback" not in said
        assert list(target.parent.iterdir()) == []
    convert(source, target)
    convert(source, tmp_path / "clean")
    assert digest(target) == digest(tmp_path / "clean")
    assert list(target.parent.iterdir()) == [target]
