"""Conversions from and to a hub: shard by shard, in bounded space, going on after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import Command, convert, digest
from fake_hub import LARGE, FakeHub, content, environment, refused, uploaded

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the client
SHARDS = 4
PROGRAM = "import sys; from qplug.cli import main; main(sys.argv[1:])"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, for what is not asked to go elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def model(hub: FakeHub, tmp_path: Path) -> Path:
    """Put a model of several shards on the hub; return the folder it was made in."""
    hub.add("them/model", uploaded(tmp_path / "model", count=SHARDS, size=400_000))
    return tmp_path / "model"


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def disk(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        except FileNotFoundError:
            continue
    return found


# From the hub ------------------------------------------------------------------------------------


def test_convert_from_the_hub(
    hub: FakeHub, model: Path, here: Path, tmp_path: Path, qplug: Command
) -> None:
    """The same bytes as from the folder; the certificate says from where; nothing else stays."""
    convert(model, tmp_path / "near", "awq")
    ran = qplug("convert", "them/model", "new/far", "--to", "awq", "--json")
    assert ran.code == 0, ran.err
    near, far = content(tmp_path / "near"), content(here / "new/far")
    certificate = json.loads(far.pop("qplug-certificate.json"))
    source = certificate["source"]
    commit = hub.repos["them/model"].branches["main"]
    assert (source["repository"], source["revision"]) == ("them/model", commit)
    assert far == {name: data for name, data in near.items() if name != "qplug-certificate.json"}
    assert [p.name for p in here.iterdir()] == ["new"]
    assert [p.name for p in (here / "new").iterdir()] == ["far"]
    assert not (tmp_path / "home").exists()
    assert all(commit in a.path for a in hub.seen("/resolve/"))


def test_convert_and_verify(hub: FakeHub, model: Path, here: Path, qplug: Command) -> None:
    ran = qplug("convert", "them/model", "far", "--to", "awq", "--verify", "--json")
    assert (ran.code, ran.json["proof"]["same"]) == (0, True)
    assert [p.name for p in here.iterdir()] == ["far"]
    assert qplug("verify", "them/model", "far").code == 0
    whole = [a for a in hub.seen("GET /blobs/") if a.range is None]
    assert len(whole) == 2 * SHARDS
    qplug("verify", "far", "them/model")
    assert len([a for a in hub.seen("GET /blobs/") if a.range is None]) == 2 * SHARDS


def test_a_dry_run_fetches_nothing(hub: FakeHub, model: Path, here: Path, qplug: Command) -> None:
    ran = qplug("convert", "them/model", "far", "--to", "awq", "--dry-run", "--json")
    assert ran.json["plan"]["verdict"] == "EXACT"
    assert all(a.range for a in hub.seen("GET /blobs/"))
    assert list(here.iterdir()) == []


def test_a_plan_that_looks_at_codes(hub: FakeHub, model: Path, here: Path, qplug: Command) -> None:
    """Asymmetric zeros to a symmetric target: the codes are read, and no shard is fetched."""
    line = ["--to", "gptq", "--bits", "8", "--sym", "--dry-run", "--json"]
    far = qplug("convert", "them/model", "far", *line)
    near = qplug("convert", model, "far", *line)
    assert far.json == near.json
    assert all(a.range for a in hub.seen("GET /blobs/"))
    assert list(here.iterdir()) == []


def test_what_is_in_the_cache_is_not_fetched(
    hub: FakeHub, model: Path, here: Path, tmp_path: Path, qplug: Command
) -> None:
    """And stays there."""
    qplug("convert", "them/model", "one", "--to", "awq")
    assert qplug("verify", "them/model", "one").code == 0
    cached = digest(tmp_path / "home" / "hub")
    del hub.asked[:]
    assert qplug("convert", "them/model", "two", "--to", "awq").code == 0
    assert hub.seen("GET /blobs/") == []
    assert digest(tmp_path / "home" / "hub") == cached
    assert digest(here / "one") == digest(here / "two")


def test_a_shard_that_is_not_what_was_listed(
    hub: FakeHub, model: Path, here: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is not believed, though its size and header are right; the rest is kept and goes on."""
    from huggingface_hub import file_download

    download = file_download.http_get

    def spoilt(url: str, temp_file: object, **more: object) -> None:
        download(url, temp_file, **more)  # type: ignore[arg-type]
        if len([a for a in hub.seen("GET /blobs/") if a.range is None]) == 2:
            temp_file.seek(-1, 2)  # type: ignore[attr-defined]
            temp_file.write(b"\x55")  # type: ignore[attr-defined]

    monkeypatch.setattr(file_download, "http_get", spoilt)
    error = refused(qplug, "convert", "them/model", "far", "--to", "awq")
    assert error["found"] == "a file that differs from its listing"
    assert error["where"].endswith("model-00002-of-00004.safetensors")
    assert "stays in .far.qplug-work" in error["fix"]
    assert not (here / "far").exists()
    monkeypatch.setattr(file_download, "http_get", download)
    del hub.asked[:]
    assert qplug("convert", "them/model", "far", "--to", "awq").code == 0
    assert len([a for a in hub.seen("GET /blobs/") if a.range is None]) == SHARDS - 1
    assert [p.name for p in here.iterdir()] == ["far"]
    convert(model, here / "near", "awq")
    assert weights(content(here / "near")) == weights(content(here / "far"))


def test_a_link_in_place_of_the_work_folder(
    hub: FakeHub, model: Path, here: Path, tmp_path: Path, qplug: Command
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (here / ".far.qplug-work").symlink_to(tmp_path / "elsewhere")
    assert refused(qplug, "convert", "them/model", "far", "--to", "awq")["found"] == "a link"
    assert list((tmp_path / "elsewhere").iterdir()) == []


# To the hub --------------------------------------------------------------------------------------


def test_from_hub_to_hub_in_bounded_space(
    hub: FakeHub, model: Path, here: Path, tmp_path: Path, qplug: Command
) -> None:
    """At most the two largest shards of the source and the open one of the output."""
    convert(model, tmp_path / "near", "awq")
    peak = 0

    def watch() -> None:
        nonlocal peak
        peak = max(peak, disk(tmp_path / "here"))

    hub.watch = watch
    ran = qplug("convert", "them/model", "--to", "awq", "--push", "me/awq", "--private", "--json")
    assert ran.code == 0, ran.err
    there = hub.files("me/awq")
    assert weights(there) == weights(content(tmp_path / "near"))
    assert hub.repos["me/awq"].private
    source = sorted(len(data) for data in weights(content(model)).values())
    output = max(len(data) for data in weights(there).values())
    small = sum(len(data) for data in content(model).values()) - sum(source) + 60_000
    assert peak <= sum(source[-2:]) + output + small
    assert sum(source[-2:]) + output + small < sum(source) + sum(map(len, weights(there).values()))
    assert list(here.iterdir()) == []
    assert not (tmp_path / "home").exists()
    assert ran.json["pushed"]["changed"]
    assert len(hub.seen("POST .*/commit/")) == 1


def test_what_a_killed_run_left_takes_no_space(
    hub: FakeHub, model: Path, here: Path, qplug: Command
) -> None:
    """A shard that is not needed any more, and one that the client fetched in part."""
    source = here / ".me--awq.qplug-push" / "source"
    parts = source / ".cache" / "huggingface" / "download"
    parts.mkdir(parents=True)
    (parts / "x.0123.incomplete").write_bytes(bytes(1000))
    last = f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors"
    (source / last).write_bytes((model / last).read_bytes())
    left: list[bool] = []

    def watch() -> None:
        if hub.asked[-1].method == "PUT" and not left:
            left.extend(
                [(source / last).exists(), *(p.exists() for p in parts.glob("*.incomplete"))]
            )

    hub.watch = watch
    assert qplug("convert", "them/model", "--to", "awq", "--push", "me/awq").code == 0
    assert left == [False]


def test_the_card_is_that_of_the_folder(
    hub: FakeHub, model: Path, here: Path, qplug: Command
) -> None:
    """Whether the files were pushed from a folder or one by one."""
    assert qplug("convert", "them/model", "--to", "awq", "--push", "me/one").code == 0
    ran = qplug("convert", "them/model", "far", "--to", "awq", "--push", "me/two")
    assert ran.code == 0
    one, two = hub.files("me/one"), hub.files("me/two")
    card = two["README.md"].replace(b"me/two", b"me/one")
    assert {**two, "README.md": card} == one
    assert b"base_model: them/model\n" in card
    assert (here / "far").exists()


def test_the_card_reads_back(hub: FakeHub, model: Path, qplug: Command) -> None:
    """What was counted from the plan is what the files say."""
    qplug("convert", "them/model", "--to", "gptq_v2", "--push", "me/v2")
    card = hub.files("me/v2")["README.md"].decode()
    found = qplug("inspect", "me/v2", "--json").json
    assert f"of which {found['weights']:,} are quantized" in card
    assert f"{found['bits_per_weight']:.3f} bits a weight" in card
    for engine in found["engines"]:
        if engine["outcome"] == "runs" and engine["engine"].endswith("qplug"):
            assert engine["command"] in card


def test_what_was_lost_is_said(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    """On the way and in the card."""
    uploaded(tmp_path / "ordered", "gptq-4b-sym-g64-actorder")
    line = ("convert", tmp_path / "ordered", "--to", "awq", "--push", "me/awq")
    assert qplug(*line).code == 3
    assert "me/awq" not in hub.repos
    ran = qplug(*line, "--allow", "requantized")
    assert ran.code == 0
    card = hub.files("me/awq")["README.md"].decode()
    linears = json.loads(hub.files("me/awq")["qplug-certificate.json"])["linears"]
    errors = [one["relative_error"] for one in linears.values() if "relative_error" in one]
    assert f"| relative error | {sum(errors) / len(errors):.4f} on average" in card
    assert f"relative error {sum(errors) / len(errors):.4f} on average" in ran.err


def test_from_a_folder_to_the_hub(hub: FakeHub, model: Path, here: Path, qplug: Command) -> None:
    before = digest(model)
    assert qplug("convert", model, "--to", "awq", "--push", "me/awq").code == 0
    assert qplug("verify", model, "me/awq").code == 0
    assert digest(model) == before
    assert list(here.iterdir()) == []


def test_shards_that_the_repository_takes_as_files(
    hub: FakeHub, model: Path, here: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_hub.LARGE", tuple(e for e in LARGE if e != ".safetensors"))
    assert qplug("convert", model, "--to", "awq", "--push", "me/awq").code == 0
    assert hub.seen("PUT ") == []
    assert len(weights(hub.files("me/awq"))) == SHARDS
    assert qplug("verify", model, "me/awq").code == 0


def test_going_on_after_an_error(
    hub: FakeHub,
    model: Path,
    here: Path,
    tmp_path: Path,
    qplug: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is fetched, made or sent again; what the hub has lost meanwhile is."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    convert(model, tmp_path / "near", "awq")
    line = ("convert", "them/model", "--to", "awq", "--push", "me/awq")

    def stop(asked: int) -> None:
        hub.faults[:] = []
        hub.fail("PUT /upload/", times=asked)
        hub.fail("PUT /upload/", times=99, status=403)

    stop(2)
    error = refused(qplug, *line)
    assert "what is finished stays in .me--awq.qplug-push" in error["fix"]
    assert len(hub.blobs) >= 2
    stop(1)
    del hub.asked[:]
    refused(qplug, *line)
    assert [a for a in hub.seen("GET /blobs/") if a.range is None] == []
    sent = [a.path for a in hub.seen("PUT ")]
    assert len(sent) == 2
    hub.faults[:] = []
    lost = next(
        p for p, d in weights(content(tmp_path / "near")).items() if d in hub.blobs.values()
    )
    lost_data = content(tmp_path / "near")[lost]
    hub.blobs = {h: d for h, d in hub.blobs.items() if d != lost_data}
    del hub.asked[:]
    ran = qplug(*line)
    assert ran.code == 0, ran.err
    assert "2 shards were uploaded before" in ran.err
    assert len(hub.seen("PUT ")) == 2
    assert weights(hub.files("me/awq")) == weights(content(tmp_path / "near"))
    assert list(here.iterdir()) == []


def test_a_folder_that_could_not_be_uploaded(
    hub: FakeHub, model: Path, here: Path, qplug: Command
) -> None:
    """Is complete, and the error says how to upload it."""
    hub.fail("POST .*/commit/", status=503)
    error = refused(qplug, "convert", "them/model", "far", "--to", "awq", "--push", "me/awq")
    assert error["fix"] == "far is complete; `qplug push far me/awq` uploads it"
    assert [p.name for p in here.iterdir()] == ["far"]
    assert qplug("push", "far", "me/awq").code == 0
    assert len(hub.seen("PUT ")) == SHARDS


@pytest.mark.parametrize(
    "line",
    [
        ["--to", "awq"],
        ["--to", "awq", "--push", "me/awq", "--verify"],
        ["far", "--to", "awq", "--private"],
        ["far", "--to", "awq", "--base-model", "a/b"],
        ["--to", "awq", "--push", "nowhere"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage(line: list[str], hub: FakeHub, qplug: Command) -> None:
    assert qplug("convert", "them/model", *line).code == 2
    assert hub.asked == []


def test_no_right_to_write_is_met_first(hub: FakeHub, model: Path, qplug: Command) -> None:
    error = refused(qplug, "convert", "them/model", "--to", "awq", "--push", "them/awq")
    assert "status 403" in error["found"]
    assert all(a.range for a in hub.seen("GET /blobs/"))


def test_dense_weights_are_not_pushed(hub: FakeHub, model: Path, qplug: Command) -> None:
    ran = qplug("convert", "them/model", "--to", "dense", "--push", "me/dense")
    assert ran.code == 2
    assert "me/dense" not in hub.repos


def test_interrupted(hub: FakeHub, model: Path, here: Path) -> None:
    """Ctrl-C in the middle of an upload: what is finished stays, and says so."""
    hub.fail("PUT /upload/")
    hub.fail("PUT /upload/", wait=20)
    line = ["convert", "them/model", "--to", "awq", "--push", "me/awq"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *line],
        env=os.environ | environment(hub, str(here.parent / "home")),
        cwd=here,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        while len(hub.seen("PUT ")) < 2 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    last = said.splitlines()[-1]
    assert last.startswith("warning: interrupted; what is finished stays in .me--awq.qplug-push")
    assert "Traceback" not in said
    assert len((here / ".me--awq.qplug-push" / "journal").read_text().splitlines()) == 2


# Killed ------------------------------------------------------------------------------------------


def run(hub: FakeHub, here: Path, line: list[str], kill_after: int | None = None) -> int:
    """Run a command, or kill it when the hub has been asked so many things."""
    env = os.environ | environment(hub, str(here.parent / "home"))
    reached = len(hub.asked) + (kill_after or 0)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *line],
        env=env,
        cwd=here,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while kill_after is not None and len(hub.asked) < reached and child.poll() is None:
        time.sleep(0.0005)
    if kill_after is not None:
        child.send_signal(signal.SIGKILL)
    return child.wait(timeout=120)


def check_killed(hub: FakeHub, here: Path, qplug: Command, shares: list[float], *line: str) -> None:
    """Kill a conversion after each share of its requests, run it again, and compare."""
    assert qplug(*line, "--push", "me/whole").code == 0
    whole, asked = hub.files("me/whole"), len(hub.asked)
    for number, share in enumerate(shares):
        name = f"me/again{number}"
        hub.blobs.clear()
        moment = max(1, round(share * asked))
        assert run(hub, here, [*line, "--push", name], kill_after=moment) in (-signal.SIGKILL, 0)
        del hub.asked[:]
        arrived = set(hub.blobs)
        assert run(hub, here, [*line, "--push", name]) == 0
        assert not arrived & {a.path.rpartition("/")[2] for a in hub.seen("PUT ")}
        again = hub.files(name)
        card = again["README.md"].replace(name.encode(), b"me/whole")
        assert {**again, "README.md": card} == whole, f"killed at request {moment} of {asked}"
        assert list(here.iterdir()) == []


def test_killed_between_hub_and_hub(hub: FakeHub, model: Path, here: Path, qplug: Command) -> None:
    check_killed(hub, here, qplug, [0.7], "convert", "them/model", "--to", "awq")


@pytest.mark.slow
def test_killed_between_hub_and_hub_at_many_moments(
    hub: FakeHub, model: Path, here: Path, qplug: Command
) -> None:
    chance = random.Random(0)
    shares = [chance.random() for _ in range(10)]
    check_killed(hub, here, qplug, shares, "convert", "them/model", "--to", "awq")


@pytest.mark.slow
def test_killed_between_hub_and_folder(
    hub: FakeHub, model: Path, here: Path, tmp_path: Path
) -> None:
    line = ["convert", "them/model", "far", "--to", "awq"]
    assert run(hub, here, line) == 0
    whole = digest(here / "far")
    for moment in random.Random(1).sample(range(1, 30), 10):
        shutil.rmtree(here / "far")
        run(hub, here, line, kill_after=moment)
        assert (here / "far").exists() or run(hub, here, line) == 0
        assert digest(here / "far") == whole
