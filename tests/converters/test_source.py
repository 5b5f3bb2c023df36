"""Checkpoints whose files are elsewhere: which ranges are read, and when a file is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from builders import GOLDEN, Draft, Q, Stored, header_of, shard_bytes, write_index

from qplug_converters import shards
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.source import Folder, Source, Span, plain, read_span
from qplug_converters.survey import survey

GPTQ = GOLDEN / "gptq-4b-asym-g64"
ORDERED = GOLDEN / "gptq-4b-sym-g64-actorder"


class Elsewhere:
    """A folder that plays a place far away."""

    def __init__(self, there: Path, folder: Path) -> None:
        self.there = Folder(there)
        self.folder = folder
        self.title = "owner/name"
        self.origin = {"repository": "owner/name", "revision": "0" * 40}
        self.read_spans: list[list[Span]] = []

    def names(self) -> list[str]:
        return self.there.names()

    def path(self, name: str) -> Path:
        self.there.path(name)
        return self.folder / name

    def size(self, name: str) -> int:
        return self.there.size(name)

    def here(self, name: str) -> bool:
        return (self.folder / name).exists()

    def need(self, names: Iterable[str]) -> None:
        self.folder.mkdir(exist_ok=True)
        for name in names:
            if not self.here(name):
                shutil.copyfile(self.there.path(name), self.folder / name)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        self.read_spans.append(list(spans))
        return [read_span(self.there.path(span.name), span) for span in spans]

    @property
    def fetched(self) -> int:
        return sum(s.end - s.begin for spans in self.read_spans for s in spans)


def padded(folder: Path, golden: Path, size: int = 4_000_000) -> Path:
    """Save a golden as two shards, the second with a large tensor that nobody needs to see."""
    draft = Draft.of(golden)
    draft.tensors["model.rotary.table"] = Stored.of(np.zeros(size // 4, np.float32))
    draft.save_sharded(folder)
    return folder


@pytest.mark.parametrize("golden", [GPTQ, ORDERED], ids=lambda p: p.name)
def test_the_same_is_read_from_afar(golden: Path, tmp_path: Path) -> None:
    there = padded(tmp_path / "there", golden)
    source: Source = Elsewhere(there, tmp_path / "here")
    near, far = open_checkpoint(there), open_checkpoint(source)
    assert far.headers == near.headers
    found, model = far.scheme()
    assert (found, model) == near.scheme()
    assert survey(far, found, model) == survey(near, found, model)
    assert not (tmp_path / "here").exists()
    for name in near.headers:
        assert bytes(far.raw(name)) == bytes(near.raw(name))
    assert [p.name for p in far.other_files] == [p.name for p in near.other_files]


def test_few_bytes_in_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config files and index, both headers at once, and each kind of small tensor at once."""
    monkeypatch.setattr(shards, "GUESS", 1024)
    there = padded(tmp_path / "there", ORDERED)
    far = Elsewhere(there, tmp_path / "here")
    checkpoint = open_checkpoint(far)
    small = [s.name for spans in far.read_spans for s in spans if s.name.endswith(".json")]
    headers = [spans for spans in far.read_spans if spans[0].name.endswith(".safetensors")]
    assert sorted(small) == ["config.json", "model.safetensors.index.json", "quantize_config.json"]
    # the guess, and in one more request what it did not cover
    assert [[span.begin for span in spans] for spans in headers] == [[0, 0], [1024, 1024]]
    del far.read_spans[:]
    found, model = checkpoint.scheme()
    assert all(scheme.act_order for scheme in model.linears.values())
    assert len(far.read_spans) == 1
    survey(checkpoint, found, model)
    assert len(far.read_spans) == 2  # each g_idx, each qzeros; float16 scales say all by that
    assert far.fetched < 100_000
    assert not (tmp_path / "here").exists()


def test_the_window_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read ahead than the window holds, and nothing twice."""
    monkeypatch.setattr(shards, "WINDOW", 1100)
    monkeypatch.setattr(shards, "GAP", 0)
    far = Elsewhere(padded(tmp_path / "there", ORDERED), tmp_path / "here")
    checkpoint = open_checkpoint(far)
    near = open_checkpoint(tmp_path / "there")
    del far.read_spans[:]
    names = [name for name in checkpoint.headers if name.endswith(".g_idx")]
    for name in names:
        assert checkpoint.peek(name).tolist() == near.peek(name).tolist()
    assert far.fetched == sum(checkpoint.headers[name].nbytes for name in names)
    assert 1 < len(far.read_spans) < len(names)


def test_tensors_are_read_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, as long as the last ones fit; a larger one brings its file."""
    there = padded(tmp_path / "there", GPTQ)
    far = Elsewhere(there, tmp_path / "here")
    checkpoint, near = open_checkpoint(far), open_checkpoint(there)
    parts = [f"{Q}.{part}" for part in ("qweight", "qzeros", "scales")]
    monkeypatch.setattr(shards, "WHOLE", sum(near.headers[name].nbytes for name in parts))
    del far.read_spans[:]
    for name in parts * 2:
        assert checkpoint.tensor(name).equal(near.tensor(name))
    assert len(far.read_spans) == 3
    other = Q.replace("q_proj", "k_proj") + ".qweight"
    assert checkpoint.tensor(other).equal(near.tensor(other))
    checkpoint.tensor(parts[0])
    assert len(far.read_spans) == 5
    assert not (tmp_path / "here").exists()
    large = "model.rotary.table"
    assert checkpoint.tensor(large).equal(near.tensor(large))
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x\ny", "a\\b"]
)
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    """Before anything is asked of the place the files are at."""
    with pytest.raises(QplugError) as refused:
        plain(name)
    assert refused.value.where == "an entry of the index"
    draft = Draft.of(GPTQ)
    draft.save_sharded(tmp_path / "there")
    write_index(tmp_path / "there", dict.fromkeys(draft.tensors, name))
    far = Elsewhere(tmp_path / "there", tmp_path / "here")
    with pytest.raises(QplugError) as refused:
        open_checkpoint(far)
    assert refused.value.found == repr(name)
    assert {s.name for spans in far.read_spans for s in spans} <= {
        "config.json",
        "model.safetensors.index.json",
    }


def test_a_header_that_lies_from_afar(tmp_path: Path) -> None:
    """The header's length is held against the file's size before more of it is asked for."""
    header, data = header_of(Draft.of(GPTQ).tensors)
    draft = Draft.of(GPTQ)
    draft.save(tmp_path / "there")
    shard = tmp_path / "there" / "model.safetensors"
    shard.write_bytes((1 << 60).to_bytes(8, "little") + shard_bytes(header, data)[8:])
    far = Elsewhere(tmp_path / "there", tmp_path / "here")
    with pytest.raises(QplugError) as refused:
        open_checkpoint(far)
    assert refused.value.found.startswith(f"a header of {1 << 60} bytes")
    shard.write_bytes(shard_bytes(header, data[:-1]))
    with pytest.raises(QplugError, match="truncated or padded"):
        open_checkpoint(far)


def test_a_large_config_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Elsewhere(GPTQ, tmp_path / "here")
    monkeypatch.setattr(Elsewhere, "size", lambda self, name: 1 << 40)
    with pytest.raises(QplugError) as refused:
        open_checkpoint(far)
    assert refused.value.where == "config.json"
    assert far.read_spans == []


def test_peeking_at_what_is_here(tmp_path: Path) -> None:
    far = Elsewhere(GPTQ, tmp_path / "here")
    checkpoint = open_checkpoint(far)
    far.need(["model.safetensors"])
    del far.read_spans[:]
    checkpoint.peek(f"{Q}.qzeros")
    assert far.read_spans == []


@pytest.mark.parametrize(
    ("blobs", "fine"),
    [
        ("models--a--b/blobs", True),
        ("blobs/ab", True),
        ("other", False),
        ("models--a/blobs", False),
    ],
)
def test_links_of_the_cache(blobs: str, fine: bool, tmp_path: Path) -> None:
    """A snapshot's files may be links to the model's blobs, or to those that all models share."""
    store = tmp_path / blobs
    store.mkdir(parents=True)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    Draft.of(GPTQ).save(snapshot)
    shard = snapshot / "model.safetensors"
    shard.rename(store / "hash")
    shard.symlink_to(store / "hash")
    if fine:
        assert open_checkpoint(snapshot).headers
    else:
        with pytest.raises(QplugError, match="a file inside the folder"):
            open_checkpoint(snapshot)
