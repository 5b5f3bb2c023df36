"""Checkpoints on a hub, with the real client against a fake one on loopback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import GOLDEN, Command, Draft, Q, write_index
from fake_hub import FakeHub, content, environment, patched, refused, uploaded

from qplug.hub import HubSource, told
from qplug.repository import Repository
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError

ASYM = GOLDEN / "gptq-4b-asym-g64"
ORDERED = GOLDEN / "gptq-4b-sym-g64-actorder"


def inspected(qplug: Command, place: object) -> Any:
    """Return what `inspect` says, whatever the place is called."""
    ran = qplug("inspect", place, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out.replace(str(place), "PLACE"))


def test_inspect_reads_headers_alone(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    """The same answer as for the folder, from a fraction of the bytes, and nothing stays."""
    files = uploaded(tmp_path / "model", ORDERED.name, size=8_000_000)
    commit = hub.add("them/model", files)
    near = inspected(qplug, tmp_path / "model")
    far = inspected(qplug, "them/model")
    assert far == near
    assert far["act_order"] == "7 of 7 linears"
    sent = sum(asked.sent for asked in hub.asked)
    assert sent * 16 < sum(map(len, files.values()))
    assert not (tmp_path / "home").exists()
    # one request for the listing, then each about the commit
    assert len(hub.seen("/api/models/them/model")) == 1
    assert all(commit in a.path for a in hub.seen("/resolve/"))


def test_the_token_stays_on_the_hub(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    hub.add("me/secret", uploaded(tmp_path / "model"), private=True)
    assert qplug("inspect", "me/secret").code == 0
    assert {a.token for a in hub.asked if not a.large} == {"hf_writer"}
    elsewhere = [a for a in hub.asked if a.large]
    assert elsewhere
    assert {a.token for a in elsewhere} == {None}


def test_zeros_on_demand(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    hub.add("them/model", uploaded(tmp_path / "model", size=8_000_000))
    near = qplug("inspect", tmp_path / "model", "--zeros", "--json").json
    far = qplug("inspect", "them/model", "--zeros", "--json").json
    assert far["zeros"] == near["zeros"]
    assert far["notes"] == near["notes"]


def test_a_folder_comes_first(
    hub: FakeHub, tmp_path: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Draft.of(ASYM).save(tmp_path / "them" / "model")
    monkeypatch.chdir(tmp_path)
    assert qplug("inspect", "them/model").code == 0
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0"])
def test_a_revision_is_pinned(
    revision: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed while a checkpoint is open is not seen."""
    files = uploaded(tmp_path / "model")
    commit = hub.add("them/model", files)
    hub.repos["them/model"].branches[revision] = commit
    source = HubSource(Repository("them/model", revision))
    assert source.title == f"them/model@{commit}"
    config = Draft.of(ORDERED).save(tmp_path / "other") / "config.json"
    hub.add("them/model", {**files, "config.json": config.read_bytes()})
    assert open_checkpoint(source).config == json.loads(files["config.json"])
    again = HubSource(Repository("them/model", commit))
    assert again.commit == commit


# What goes wrong ---------------------------------------------------------------------------------


def test_repositories_that_cannot_be_read(
    hub: FakeHub, tmp_path: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = uploaded(tmp_path / "model")
    hub.add("them/secret", files, private=True)
    hub.add("them/gated", files, gated=True)
    hub.add("them/model", files)
    hub.add("them/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    nowhere = "no such folder and no such repository"
    for name in ("them/nothing", "them/secret"):
        error = refused(qplug, "inspect", name)
        assert (error["found"], error["where"]) == (nowhere, name)
    error = refused(qplug, "inspect", "them/gated")
    assert error["found"] == "a gated repository"
    assert f"{hub.endpoint}/them/gated" in error["fix"]
    error = refused(qplug, "inspect", "them/model@v9")
    assert (error["found"], error["where"]) == ("no such revision", "them/model@v9")
    error = refused(qplug, "inspect", "them/pickles")
    assert error["found"] == "only pytorch_model.bin, a pickle, which can run any code"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "not accepted" in refused(qplug, "inspect", "them/model")["found"]
    monkeypatch.delenv("HF_TOKEN")
    assert refused(qplug, "inspect", "them/secret")["found"] == nowhere
    assert qplug("inspect", "them/model").code == 0


def test_offline(hub: FakeHub, qplug: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(qplug, "inspect", "them/model")
    assert (error["found"], error["fix"]) == ("HF_HUB_OFFLINE is set", "unset it")
    assert hub.asked == []


def test_no_connection(tmp_path: Path, qplug: Command) -> None:
    with FakeHub() as gone:
        pass
    with patched(gone, str(tmp_path / "home")):
        error = refused(qplug, "inspect", "them/model")
    assert error["found"].startswith("no connection (")
    assert gone.endpoint in error["expected"]


@pytest.mark.parametrize(
    "text", ["a", "a/b/c", "../b", "a/..", "a/b--c", "a//b", "/a/b", "a/b@", "a/b@x y", "-a/b", ""]
)
def test_texts_that_name_no_repository(text: str) -> None:
    assert Repository.parse(text) is None


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 503}, {"status": 429}, {"drop_after": 0}, {"drop_after": 100}],
    ids=str,
)
def test_what_passes_is_tried_again(
    fault: dict[str, int],
    hub: FakeHub,
    tmp_path: Path,
    qplug: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qplug.hub.source.WAITS", (0, 0))
    hub.add("them/model", uploaded(tmp_path / "model"))
    near = inspected(qplug, tmp_path / "model")
    hub.fail("/resolve/.*config.json", times=1, **fault)
    hub.fail("/blobs/", times=2, **fault)
    assert inspected(qplug, "them/model") == near
    hub.fail("/blobs/", times=99, **fault)
    error = refused(qplug, "inspect", "them/model")
    assert error["where"].endswith(".safetensors")
    assert str(fault.get("status", "no connection")) in error["found"]


def test_a_server_that_does_not_answer(
    hub: FakeHub, tmp_path: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qplug.hub.source.WAITS", (0,))
    monkeypatch.setattr("qplug.hub.source.TIMEOUT", 0.2)
    hub.add("them/model", uploaded(tmp_path / "model"))
    hub.fail("/blobs/", times=99, wait=0.5)
    assert refused(qplug, "inspect", "them/model")["found"].startswith("no connection (")


def test_a_server_without_ranges(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    """Is left before it has sent a whole shard."""
    files = uploaded(tmp_path / "model", size=32_000_000)
    hub.add("them/model", files)
    hub.fail("/blobs/", times=99, whole=True)
    error = refused(qplug, "inspect", "them/model")
    assert error["found"] == "the whole file (status 200)"
    assert error["where"].endswith("model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../../secret/resolve/main/model.safetensors", "/me/secret/resolve/main/model.safetensors",
     "..%2f..%2fsecret", "sub/model.safetensors", "https://example.org/x.safetensors"],
)  # fmt: skip
def test_an_index_that_leads_to_another_repository(
    name: str, hub: FakeHub, tmp_path: Path, qplug: Command
) -> None:
    """huggingface_hub's own metadata call follows it there, with the token."""
    files = uploaded(tmp_path / "model")
    hub.add("me/secret", files, private=True)
    weights = json.loads(files["model.safetensors.index.json"])["weight_map"]
    write_index(tmp_path / "model", {**weights, f"{Q}.qweight": name})
    hub.add("them/model", content(tmp_path / "model"))
    error = refused(qplug, "inspect", "them/model")
    assert name in error["found"] + error["where"]
    assert all("secret" not in asked.path for asked in hub.asked)
    assert not any(asked.large for asked in hub.asked)


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a/../b", "a//b", "x\ny", "a\\b"])
def test_a_listing_that_leads_elsewhere(
    name: str, hub: FakeHub, tmp_path: Path, qplug: Command
) -> None:
    hub.add("them/model", {**uploaded(tmp_path / "model"), name: b"{}"})
    error = refused(qplug, "inspect", "them/model")
    assert error["where"] == "the listing of them/model"
    assert len(hub.asked) == 1


def test_what_the_client_raises() -> None:
    """Is one line about the place; a bug stays a bug."""
    from huggingface_hub import errors

    wrapped = errors.LocalEntryNotFoundError("no network")
    wrapped.__cause__ = errors.FileMetadataError("no X-Repo-Commit")
    for error, said in (
        (wrapped, "an answer that is not a hub's"),
        (errors.HFValidationError("bad name"), "bad name"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError("Consistency check failed: size"), "a file that arrived in part"),
    ):
        with pytest.raises(QplugError) as refused, told("them/model"):
            raise error
        assert (refused.value.found, refused.value.where) == (said, "them/model")
    with pytest.raises(KeyError), told("them/model"):
        raise KeyError("a bug")


def test_names_below_folders_are_left_alone(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    files = uploaded(tmp_path / "model")
    hub.add("them/model", {**files, "onnx/model.onnx": b"x", "onnx/model.safetensors": b"x"})
    ran = qplug("inspect", "them/model")
    assert ran.code == 0
    assert ran.err == "warning: not part of the model, and not carried along: onnx/\n"


def test_the_command_in_a_process_of_its_own(hub: FakeHub, tmp_path: Path) -> None:
    """With the client as its variables set it up; torch is not loaded to read headers."""
    hub.add("me/secret", uploaded(tmp_path / "model"), private=True)
    program = (
        "import sys; from qplug.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "me/secret"],
        env=os.environ | environment(hub, str(tmp_path / "home")),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "format             gptq" in done.stdout
