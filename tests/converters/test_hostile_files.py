"""Files made to mislead: headers that lie, pickles by any name, links, pipes, what changes."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import GOLDEN, Draft, Q, Stored, convert, header_of, shard_bytes, write_index
from spoil import (
    GPTQ,
    SHARD,
    SIDE,
    Bad,
    Write,
    entry,
    header,
    index,
    listing,
    many_tensors,
    points_at,
    raw_shard,
    refused_on_the_way,
)

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey
from qplug_converters.verify import verify

SCALES = f"{Q}.scales"
SECOND = "model-00002-of-00002.safetensors"


# Headers -----------------------------------------------------------------------------------------


def text(change: Callable[[str], str | bytes]) -> Write:
    """Change the header as text, over data that stays."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save_small(folder)
        lies, data = header_of(draft.tensors)
        changed = change(json.dumps(lies))
        raw = changed if isinstance(changed, bytes) else changed.encode()
        (folder / SHARD).write_bytes(shard_bytes(raw, data))

    return write


def twice(key: str) -> Callable[[str], str]:
    return lambda raw: raw.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)


def added(name: str, **fields: Any) -> Write:
    """Add an entry for no data."""
    whole = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], **fields}
    return header(lambda lies: lies.update({name: whole}))


HEADERS = [
    Bad("size 2^63", GPTQ, entry(SCALES, shape=[1 << 63, 1]), SCALES, "a damaged entry"),
    Bad("size 2^64 wraps to 0", GPTQ, entry(SCALES, shape=[1 << 64]), SCALES, "a damaged entry"),
    Bad("sizes whose product wraps", GPTQ, entry(SCALES, shape=[1 << 62, 1 << 62, 4]), SCALES,
        "512 bytes, expected"),
    Bad("size -1", GPTQ, entry(SCALES, shape=[-1, -256]), SCALES, "a damaged entry"),
    Bad("size NaN", GPTQ, entry(SCALES, shape=[float("nan")]), SCALES, "a damaged entry"),
    Bad("size infinite", GPTQ, entry(SCALES, shape=[float("inf"), 0]), SCALES, "a damaged entry"),
    Bad("offsets 2^63", GPTQ, entry(SCALES, data_offsets=[1 << 63, (1 << 63) + 512]), SCALES,
        "a damaged entry"),
    Bad("offsets that wrap", GPTQ, entry(SCALES, data_offsets=[(1 << 64) - 512, 0]), SCALES,
        "a damaged entry"),
    Bad("offset of 5000 digits", GPTQ, text(lambda raw: raw.replace("[0, ", f"[{'9' * 5000}, ", 1)),
        SHARD, "no JSON header"),
    Bad("a million axes", GPTQ, entry(SCALES, shape=[1] * 1_000_000), SCALES, "a damaged entry"),
    Bad("a million sizes", GPTQ, added("x", shape=[1 << 62] * 1_000_000), ": x", "a damaged entry"),
    Bad("a name of a megabyte", GPTQ, added("x" * 1_000_000), "xxx", "a damaged entry"),
    Bad("a name of dots", GPTQ, added("." * 100_000), "...", "a damaged entry"),
    Bad("a name without characters", GPTQ, added(""), SHARD, "a damaged entry"),
    Bad("a hole of one byte", GPTQ, added("x", data_offsets=[1, 1]), "model.", "data from byte"),
    Bad("nothing, inside another", GPTQ, added("x", data_offsets=[7, 7]), ": x",
        "data from byte 7"),
    Bad("nothing, past the end", GPTQ, added("x", data_offsets=[1 << 40] * 2), ": x",
        "data from byte 1099511627776"),
    Bad("dtype twice", GPTQ, text(twice("dtype")), SHARD, "two entries named 'dtype'"),
    Bad("offsets twice", GPTQ, text(twice("data_offsets")), SHARD, "two entries named 'data_off"),
    Bad("metadata twice", GPTQ, text(lambda raw: raw.replace("{", '{"__metadata__": {}, ', 1)),
        SHARD, "two entries named '__metadata__'"),
    Bad("metadata a list", GPTQ, header(lambda lies: lies.update(__metadata__=[1])),
        "__metadata__", "a damaged entry"),
    Bad("metadata a tensor", GPTQ, header(lambda lies: lies.update(__metadata__=lies.pop(SCALES))),
        "__metadata__", "a damaged entry"),
    Bad("more behind the header", GPTQ, text(lambda raw: raw + "{}"), SHARD, "no JSON header"),
    Bad("zeros behind the header", GPTQ, text(lambda raw: raw + "\0" * 8), SHARD, "no JSON header"),
    Bad("a byte order mark", GPTQ, text(lambda raw: b"\xef\xbb\xbf" + raw.encode()), SHARD,
        "no JSON header"),
    Bad("NUL inside a name", GPTQ, text(lambda raw: raw.replace("scales", "sca\0les", 1)), SHARD,
        "no JSON header"),
    Bad("half floats of 4 bits", GPTQ, entry(SCALES, dtype="F4"), SCALES, "dtype 'F4'"),
    Bad("a dtype of 10 kB", GPTQ, entry(SCALES, dtype="F" * 10_000), SCALES, "dtype 'FFF"),
    Bad("weights_only header", GPTQ, raw_shard(lambda b: b"{" + b), SHARD, "a header of"),
    Bad("100000 names and one twice", GPTQ, text(lambda raw: "{" + ",".join(
        f'"{n % 99_999}": {{}}' for n in range(100_000)) + "}"), SHARD, "two entries named '0'"),
]  # fmt: skip


# Pickles -----------------------------------------------------------------------------------------


class Exploding:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


TRACE = "unpickled"


def bomb(folder: Path) -> bytes:
    return pickle.dumps(Exploding(folder.parent / TRACE))


def zipped(folder: Path) -> bytes:
    """A file as torch.save writes it."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/data.pkl", bomb(folder))
        archive.writestr("archive/version", "3\n")
    return raw.getvalue()


def holds(name: str, content: Callable[[Path], bytes]) -> Write:
    """A checkpoint in which one file is something else."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save(folder)
        (folder / name).write_bytes(content(folder))

    return write


def only(name: str, content: Callable[[Path], bytes]) -> Write:
    """A checkpoint whose weights are in another file."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save_small(folder)
        (folder / name).write_bytes(content(folder))

    return write


def index_of_pickles(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    (folder / "pytorch_model.bin").write_bytes(bomb(folder))
    write_index(folder, dict.fromkeys(draft.tensors, "pytorch_model.bin"))


def polyglot(draft: Draft, folder: Path) -> None:
    """A zip behind a whole safetensors file: unzip finds it from the end."""
    draft.save_small(folder)
    (folder / SHARD).write_bytes(draft.shard() + zipped(folder))


PICKLES = [
    Bad("a pickle as shard", GPTQ, holds(SHARD, bomb), SHARD, "a header of"),
    Bad("a zip as shard", GPTQ, holds(SHARD, zipped), SHARD, "a header of"),
    Bad("a safetensors that is a zip too", GPTQ, polyglot, SHARD, "bytes of data"),
    Bad("an index of pickles", GPTQ, index_of_pickles, "pytorch_model.bin", "a header of"),
    Bad("a pickle as config", GPTQ, holds("config.json", bomb), "config.json", "no JSON"),
    Bad("a zip as config", GPTQ, holds("config.json", zipped), "config.json", "no JSON"),
    Bad("a pickle as side config", GPTQ, holds(SIDE, bomb), SIDE, "no JSON"),
    Bad("a pickle as index", GPTQ, holds("model.safetensors.index.json", bomb), "index.json",
        "no JSON"),
    *(
        Bad(f"only {name}", GPTQ, only(name, bomb), "source", f"only {name}, a pickle")
        for name in ("model.pt", "weights.pth", "last.ckpt", "model.pkl", "x.pickle")
    ),
]  # fmt: skip


# Indexes and other files -------------------------------------------------------------------------


def fifo(name: str) -> Write:
    """A pipe in the place of a file: opening it would wait for ever."""

    def write(draft: Draft, folder: Path) -> None:
        draft.save_sharded(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return write


def link(name: str, to: str) -> Write:
    def write(draft: Draft, folder: Path) -> None:
        draft.save_sharded(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return write


def folder_at(name: str) -> Write:
    def write(draft: Draft, folder: Path) -> None:
        draft.save_sharded(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return write


def links_in_a_circle(draft: Draft, folder: Path) -> None:
    draft.save_small(folder)
    for n in range(3):
        (folder / f"{n}.safetensors").symlink_to(f"{(n + 1) % 3}.safetensors")
    write_index(folder, dict.fromkeys(draft.tensors, "0.safetensors"))


INDEX = "model.safetensors.index.json"
PLACES = [
    *(
        Bad(f"index names {name!r}", GPTQ, points_at(name), "index", repr(name)[:40])
        for name in ("../../x", "./x.safetensors", "a/../../x", "..\\x", "C:\\x", "//x/y", "~/x/y",
                     "%2e%2e/x", "x\n.safetensors", "\x1b[31m", "\u202ex", "file:///etc/passwd")
    ),
    Bad("no such tensor, 10 kB", GPTQ, index(lambda m, _: m.update({"x" * 10_000: SECOND})), SECOND,
        "no such tensor"),
    Bad("index a pipe", GPTQ, fifo(INDEX), INDEX, "no regular file"),
    Bad("index a folder", GPTQ, folder_at(INDEX), "source", "no index"),
    Bad("index a link out", GPTQ, link(INDEX, "../../../../etc/passwd"), INDEX, "a link to"),
    Bad("index of 200 lists", GPTQ, index(lambda m, f: json.loads("[" * 200 + "]" * 200)), INDEX,
        "nested more than"),
    Bad("shard a pipe", GPTQ, fifo(SECOND), SECOND, "no regular file"),
    Bad("shard a folder", GPTQ, folder_at(SECOND), SECOND, "no regular file"),
    Bad("shard a device", GPTQ, link(SECOND, "/dev/zero"), SECOND, "a link to"),
    Bad("shard a link out by ..", GPTQ, link(SECOND, "../source/../../x"), SECOND, "a link to"),
    Bad("shard a link to nothing", GPTQ, link(SECOND, "nothing"), SECOND, "a link to nothing"),
    Bad("links in a circle", GPTQ, links_in_a_circle, "0.safetensors", "link"),
    Bad("config a pipe", GPTQ, fifo("config.json"), "config.json", "no regular file"),
    Bad("side config a pipe", GPTQ, fifo(SIDE), SIDE, "no regular file"),
    Bad("side config a link out", GPTQ, link(SIDE, "/etc/hostname"), SIDE, "a link to"),
    Bad("tokenizer a pipe", GPTQ, fifo("tokenizer.json"), "tokenizer.json", "no regular file"),
    Bad("tokenizer a link out", GPTQ, link("tokenizer.json", "/etc/passwd"), "tokenizer.json",
        "a link to /etc/passwd"),
    Bad("a file of two lines", GPTQ, holds("a\nb.txt", lambda _: b"x"), "", "'a\\nb.txt'"),
]  # fmt: skip

FILES = [*HEADERS, *PICKLES, *PLACES]


@pytest.mark.parametrize("bad", FILES, ids=lambda b: b.name)
def test_refused(bad: Bad, tmp_path: Path) -> None:
    refused_on_the_way(bad, tmp_path)
    assert not (tmp_path / TRACE).exists()


def test_a_zip_inside_a_tensor_is_a_tensor(tmp_path: Path) -> None:
    """Some programs would take such a file for an archive; its bytes are carried along."""
    draft = Draft.of(GPTQ)
    raw = zipped(tmp_path / "source")
    draft.tensors["z.buffer"] = Stored("U8", [len(raw)], raw)
    draft.save(tmp_path / "source")
    assert zipfile.is_zipfile(tmp_path / "source" / SHARD)
    convert(tmp_path / "source", tmp_path / "target", "awq")
    assert bytes(open_checkpoint(tmp_path / "target").raw("z.buffer")) == raw
    assert not (tmp_path / TRACE).exists()


# Permissions -------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[Path]:
    """Return a folder that everybody may enter, in the shoes of somebody without rights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if os.geteuid() != 0:
            yield folder
            return
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("name", [SHARD, "config.json", SIDE, "tokenizer.json", "."])
def test_what_may_not_be_read(name: str, nobody: Path) -> None:
    source = nobody / "source"
    draft = Draft.of(GPTQ)
    draft.files["tokenizer.json"] = b"{}"
    draft.save(source)
    (source / name).chmod(0)
    try:
        with pytest.raises(QplugError, match=r"cannot be read \(Permission denied\)") as caught:
            convert(source, nobody / "target")
        assert (source / name).name in caught.value.where
        assert caught.value.fix
        assert [p.name for p in nobody.iterdir()] == ["source"]
    finally:
        (source / name).chmod(0o700)


# Files that change -------------------------------------------------------------------------------


def shrunk(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 600)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replaced(path: Path) -> None:
    """By another of the same size and time."""
    new, state = path.with_name("new"), path.stat()
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.rename(path)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (shrunk, "a file that became shorter"),
        (emptied, "a file that became shorter"),
        (touched, "a file that changed while it was read"),
        (replaced, "a file that changed while it was read"),
    ],
)
@pytest.mark.parametrize("to", ["gptq", "gptq_v2"])
def test_a_shard_that_changes_while_it_is_read(
    spoil: Callable[[Path], None], found: str, to: str, tmp_path: Path
) -> None:
    """Copied or decoded: half of the one file and half of the other is no checkpoint."""
    source = Draft.of(GPTQ).save(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    of, model = checkpoint.scheme()
    plan = make_plan(of, survey(open_checkpoint(source), of, model), formats.find(to))
    spoil(source / SHARD)
    before = listing(tmp_path)
    with pytest.raises(QplugError) as caught:
        execute(plan, checkpoint, tmp_path / "target")
    assert (caught.value.found, caught.value.where) == (found, SHARD)
    assert caught.value.fix
    assert listing(tmp_path) == before


@pytest.mark.parametrize("spoil", [shrunk, emptied, touched, replaced])
def test_a_shard_that_changes_while_it_is_verified(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    source = Draft.of(GPTQ).save(tmp_path / "source")
    checkpoint = open_checkpoint(source)
    spoil(source / SHARD)
    with pytest.raises(QplugError) as caught:
        verify(open_checkpoint(GOLDEN / GPTQ), checkpoint)
    assert caught.value.where == SHARD
    assert caught.value.found in (
        "a file that became shorter", "a file that changed while it was read"
    )  # fmt: skip


# Many --------------------------------------------------------------------------------------------


def test_many_tensors_take_time_in_proportion(tmp_path: Path) -> None:
    """Ten thousand of 2 500 linears; a million are in integration/soak."""
    seconds = many_tensors(tmp_path, 2_500)
    assert seconds < 10, f"{seconds:.1f} s"
