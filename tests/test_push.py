"""Uploading checkpoints, with the real client against a fake hub: files, card, deletions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builders import GOLDEN, Command, convert, digest
from fake_hub import FakeHub, Repo, content, environment, patched, refused, uploaded

from qplug.card import BEGIN, END, Card
from qplug_converters.errors import QplugError

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the client


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    """Return a converted folder whose source had a card."""
    source = tmp_path / "source"
    uploaded(source, count=3)
    card = "---\nlicense: apache-2.0\ntags: [text]\n---\n# Of the source\n"
    (source / "README.md").write_text(card)
    convert(source, tmp_path / "awq", "awq")
    return tmp_path / "awq"


def metadata(card: bytes) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split(b"---\n")[1])
    return found


def test_push(hub: FakeHub, awq: Path, qplug: Command) -> None:
    """Every file arrives, large ones through large file storage, in one commit."""
    before = digest(awq)
    ran = qplug("push", awq, "me/model", "--private", "--base-model", "them/base", "--json")
    assert (ran.code, ran.err) == (0, "")
    repo, there, files = hub.repos["me/model"], hub.files("me/model"), content(awq)
    assert repo.private
    assert {n: there[n] for n in files if n != "README.md"} == {
        n: data for n, data in files.items() if n != "README.md"
    }
    assert set(there) == {*files, ".gitattributes"}
    assert len(hub.seen("POST .*/commit/")) == 1
    assert len(hub.seen("PUT /upload/")) == 3
    assert {a.token for a in hub.asked if a.large} == {None}
    assert ran.json["commit"] == repo.branches["main"]
    assert ran.json["changed"]
    assert digest(awq) == before


def test_the_card(hub: FakeHub, awq: Path, qplug: Command) -> None:
    qplug("push", awq, "me/model", "--base-model", "them/base")
    card = hub.files("me/model")["README.md"]
    assert metadata(card) == {
        "license": "apache-2.0",
        "tags": ["text", "qplug", "awq", "4-bit"],
        "base_model": "them/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
    }
    size = sum(p.stat().st_size for p in awq.glob("*.safetensors"))
    text = card.decode()
    # 98,304 weights of linears; embedding, norms and the large tensor
    assert "| parameters | 1,115,072, of which 98,304 are quantized |" in text
    assert f"| size | {size:,} bytes in 3 files |" in text
    assert "| quantized | 7 linears 4-bit asym g64; 4.312 bits a weight" in text
    assert "| what happened | 7 linears EXACT |" in text
    assert "format `gptq`, by qplug" in text
    assert "vllm serve me/model --quantization qplug-awq" in text
    assert text.endswith("# Of the source\n")
    assert str(awq) not in text


def test_pushing_again_changes_nothing(hub: FakeHub, awq: Path, qplug: Command) -> None:
    first = qplug("push", awq, "me/model", "--json").json
    sent = len(hub.seen("PUT "))
    again = qplug("push", awq, "me/model", "--json")
    assert (again.json["changed"], again.json["commit"]) == (False, first["commit"])
    assert len(hub.seen("PUT ")) == sent
    assert again.code == 0


def test_what_is_stale_goes_in_the_same_commit(hub: FakeHub, awq: Path, qplug: Command) -> None:
    old = {
        "model-00001-of-00009.safetensors": b"old",
        "model.safetensors": b"older",
        "adapter.safetensors.index.json": b"{}",
        "quantize_config.json": b"{}",
        "qplug-certificate.json": b"{}",
        "original/model.safetensors": b"somebody's",
        "notes.txt": b"mine",
    }
    before = hub.add("me/model", old)
    ran = qplug("push", awq, "me/model", "--json")
    assert ran.json["deleted"] == [
        "adapter.safetensors.index.json",
        "model-00001-of-00009.safetensors",
        "model.safetensors",
        "quantize_config.json",
    ]
    after = hub.repos["me/model"].commits[ran.json["commit"]]
    assert after.parent == before
    assert {"original/model.safetensors", "notes.txt"} <= set(after.files)
    assert not set(ran.json["deleted"]) & set(after.files)
    assert after.files["qplug-certificate.json"].data != b"{}"


def test_what_people_wrote_stays(hub: FakeHub, awq: Path, qplug: Command) -> None:
    """In the card of the repository; only the section between the marks is written again."""
    mine = "---\nlicense: mit\nmodel-index:\n- name: x\n---\n# Mine\r\n\nBy hand.\n"
    hub.add("me/model", {"README.md": mine.encode()})
    qplug("push", awq, "me/model", "--base-model", "them/base")
    card = hub.files("me/model")["README.md"].decode()
    assert metadata(card.encode())["license"] == "mit"
    assert metadata(card.encode())["model-index"] == [{"name": "x"}]
    assert card.endswith("# Mine\n\nBy hand.\n")
    files = hub.files("me/model")
    begin, end = card.index(BEGIN), card.index(END)
    hub.add(
        "me/model",
        {**files, "README.md": (card[:begin] + BEGIN + "\nlies\n" + card[end:] + "More.").encode()},
    )
    qplug("push", awq, "me/model")
    assert hub.files("me/model")["README.md"].decode() == card + "More."


def test_the_base_is_the_source_on_the_hub(
    hub: FakeHub, awq: Path, qplug: Command, tmp_path: Path
) -> None:
    """Where nothing is given: what the certificate names; a card that says quantized goes first."""
    certificate = json.loads((awq / "qplug-certificate.json").read_text())
    certificate["source"] |= {"repository": "them/gptq", "revision": "c" * 40}
    (awq / "qplug-certificate.json").write_text(json.dumps(certificate))
    ran = qplug("push", awq, "me/model")
    assert "--base-model" not in ran.err
    card = hub.files("me/model")["README.md"]
    assert metadata(card)["base_model"] == "them/gptq"
    assert f"them/gptq at `{'c' * 40}`, format `gptq`" in card.decode()
    quantized = "---\nbase_model: them/base\nbase_model_relation: quantized\n---\n"
    (awq / "README.md").write_text(quantized)
    qplug("push", awq, "me/other")
    assert metadata(hub.files("me/other")["README.md"])["base_model"] == "them/base"


def test_a_base_that_nobody_knows(hub: FakeHub, awq: Path, qplug: Command) -> None:
    """A card of a model that was fine-tuned from another does not say what was quantized."""
    (awq / "README.md").write_text("---\nbase_model: them/base\n---\n")
    (awq / "LICENSE").write_text("Do as you like.")
    ran = qplug("push", awq, "me/model")
    assert "--base-model owner/name" in ran.err
    found = metadata(hub.files("me/model")["README.md"])
    assert "base_model_relation" not in found
    assert found["license"] == "other"
    assert found["license_link"] == "LICENSE"


def test_a_branch_and_a_message(hub: FakeHub, awq: Path, qplug: Command) -> None:
    hub.add("me/model", {"notes.txt": b"mine"})
    main = hub.repos["me/model"].branches["main"]
    assert qplug("push", awq, "me/model", "--revision", "awq", "--message", "Try").code == 0
    repo = hub.repos["me/model"]
    assert repo.branches["main"] == main
    assert repo.commits[repo.branches["awq"]].message == "Try"
    assert "model.safetensors.index.json" in hub.files("me/model", "awq")
    assert qplug("push", awq, "me/model@awq", "--revision", "x").code == 2


def test_private_is_kept(hub: FakeHub, awq: Path, qplug: Command) -> None:
    """What is asked to be private is never uploaded to where everybody can see it."""
    hub.add("me/model", {"a": b"b"})
    error = refused(qplug, "push", awq, "me/model", "--private")
    assert error["found"] == "a public repository"
    assert hub.seen("PUT |POST .*/commit/") == []
    hub.repos["me/model"].private = True
    assert qplug("push", awq, "me/model", "--private").code == 0
    assert qplug("push", awq, "me/model").code == 0


def test_left_behind_is_said(hub: FakeHub, awq: Path, qplug: Command) -> None:
    (awq / "pytorch_model.bin").write_bytes(b"pickle")
    (awq / "runs").mkdir()
    (awq / ".cache").write_bytes(b"x")
    ran = qplug("push", awq, "me/model")
    assert ran.err.count("not part of the model, and not uploaded") == 2
    assert not {"pytorch_model.bin", ".cache"} & set(hub.files("me/model"))


# What goes wrong ---------------------------------------------------------------------------------


def test_pushes_that_are_refused(
    hub: FakeHub, awq: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is uploaded."""
    error = refused(qplug, "push", awq, "them/model")
    assert "no right to do this (status 403" in error["found"]
    hub.repos["them/open"] = Repo()
    hub.add("them/open", {"a": b"b"})
    assert "status 403" in refused(qplug, "push", awq, "them/open")["found"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "a token that is not accepted" in refused(qplug, "push", awq, "me/model")["found"]
    monkeypatch.delenv("HF_TOKEN")
    error = refused(qplug, "push", awq, "me/model")
    assert (error["found"], error["where"]) == ("no token", "me/model")
    assert qplug("push", awq, "model").code == 2
    assert "me/model" not in hub.repos
    assert hub.seen("PUT |POST .*/commit/|batch") == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "README.md").write_text("---\n[: }\n---\n"),
        lambda folder: (folder / "README.md").write_text("---\n- a list\n---\n"),
    ],
    ids=["lost", "cut", "config", "card", "list"],
)
def test_folders_that_are_not_whole(spoil: object, hub: FakeHub, awq: Path, qplug: Command) -> None:
    assert callable(spoil)
    spoil(awq)
    refused(qplug, "push", awq, "me/model")
    assert hub.seen("POST .*/commit/|PUT") == []


def test_a_dense_folder(hub: FakeHub, tmp_path: Path, qplug: Command) -> None:
    convert(GOLDEN / "gptq-4b-asym-g64", tmp_path / "dense", "dense")
    error = refused(qplug, "push", tmp_path / "dense", "me/model")
    assert error["found"] == "a checkpoint that is not quantized"


def test_somebody_else_committed_meanwhile(
    hub: FakeHub, awq: Path, qplug: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be deleted was decided on another state: nothing is committed."""
    from huggingface_hub import HfApi

    create = HfApi.create_commit

    def late(self: HfApi, *arguments: object, **more: object) -> object:
        hub.add("me/model", {"model.safetensors": b"theirs"})
        return create(self, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(HfApi, "create_commit", late)
    error = refused(qplug, "push", awq, "me/model")
    assert error["found"].startswith("a change by somebody else (status 412")
    assert hub.files("me/model") == {"model.safetensors": b"theirs"}


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("PUT /upload/", {"status": 500}),
        ("PUT /upload/", {"drop_after": 1000}),
        ("POST .*/commit/", {"status": 500}),
        ("POST .*/commit/", {"drop_after": 0}),
        ("POST .*batch", {"status": 403}),
    ],
    ids=str,
)
def test_a_connection_that_fails(
    pattern: str,
    fault: dict[str, int],
    hub: FakeHub,
    awq: Path,
    qplug: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One clear line; the next push sends what is missing, and only that."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(pattern, times=99, **fault)
    error = refused(qplug, "push", awq, "me/model")
    assert error["where"] == "me/model"
    assert str(fault.get("status", "no connection")) in error["found"]
    assert set(hub.files("me/model")) == {".gitattributes"}
    arrived = set(hub.blobs)
    del hub.faults[:], hub.asked[:]
    assert qplug("push", awq, "me/model").code == 0
    assert len(hub.seen("PUT ")) == 3 - len(arrived)


@pytest.mark.parametrize("cause", [None, TimeoutError(110, "Connection timed out")])
def test_a_client_that_fails(
    cause: OSError | None,
    hub: FakeHub,
    awq: Path,
    qplug: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its own ways: hf_xet knows one kind of error, threads wrap theirs."""
    from huggingface_hub import HfApi

    def fail(self: HfApi, *arguments: object, **more: object) -> None:
        raise RuntimeError("Data processing error") from cause

    monkeypatch.setattr(HfApi, "create_commit", fail)
    error = refused(qplug, "push", awq, "me/model")
    assert error["where"] == "me/model"
    assert ("Connection timed out" if cause else "Data processing error") in error["found"]


def test_no_connection(awq: Path, tmp_path: Path, qplug: Command) -> None:
    with FakeHub() as gone:
        pass
    with patched(gone, str(tmp_path / "home")):
        assert refused(qplug, "push", awq, "me/model")["found"].startswith("no connection (")


# Killed ------------------------------------------------------------------------------------------

PUSH = "import sys; from qplug.cli import main; main(sys.argv[1:])"


def killed_and_again(hub: FakeHub, folder: Path, home: Path, after: int, name: str) -> None:
    """Push, kill at the request number `after`, push again."""
    command = [sys.executable, "-c", PUSH, "push", str(folder), name, "--base-model", "a/b"]
    env = os.environ | environment(hub, str(home))
    reached = len(hub.asked) + after
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(hub.asked) < reached and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def check_killed(
    hub: FakeHub, awq: Path, tmp_path: Path, qplug: Command, moments: list[int]
) -> None:
    assert qplug("push", awq, "me/whole", "--base-model", "a/b").code == 0
    whole = hub.files("me/whole")
    for number, after in enumerate(moments):
        hub.blobs.clear()
        name = f"me/again{number}"
        killed_and_again(hub, awq, tmp_path / "home", after, name)
        again = hub.files(name)
        card = again["README.md"].replace(name.encode(), b"me/whole")
        card = card.replace(name[3:].encode(), b"whole")
        assert {**again, "README.md": card} == whole, f"killed at request {after}"


def test_killed_while_pushing(hub: FakeHub, awq: Path, tmp_path: Path, qplug: Command) -> None:
    check_killed(hub, awq, tmp_path, qplug, [6, 11])


@pytest.mark.slow
def test_killed_while_pushing_at_many_moments(
    hub: FakeHub, awq: Path, tmp_path: Path, qplug: Command
) -> None:
    check_killed(hub, awq, tmp_path, qplug, random.Random(0).sample(range(1, 17), 10))


# Cards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("", ""),
        ("# A\n", "# A\n"),
        ("---\na: 1\n---\n# A\n", "# A\n"),
        ("---\n---\n# A\n", "# A\n"),
        ("\n---\na: 1\n---", ""),
        ("# A\n\n---\nb\n---\n", "# A\n\n---\nb\n---\n"),
    ],
)
def test_cards_are_read(text: str, body: str) -> None:
    card = Card.parse(text.encode(), "README.md")
    assert card.body == body
    assert card.metadata in ({}, {"a": 1})


def test_a_large_card() -> None:
    with pytest.raises(QplugError, match="at most"):
        Card.parse(b"x" * ((1 << 20) + 1), "README.md")
