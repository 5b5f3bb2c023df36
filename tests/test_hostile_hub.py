"""A hub that lies: listings, redirects and content that are not what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from builders import Command
from fake_hub import FakeHub, refused, uploaded

SHARD = "model-00002-of-00002.safetensors"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def model(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Return the files of `them/model`."""
    monkeypatch.setattr("qplug.hub.source.WAITS", ())
    files = uploaded(tmp_path / "model", size=400_000)
    hub.add("them/model", files)
    return files


def listing(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Change what the hub says of a repository."""
    honest = fake_hub._Handler._json

    def lie(self: Any, value: Any, *more: Any, **named: Any) -> None:
        if isinstance(value, dict) and "siblings" in value:
            change(value)
        honest(self, value, *more, **named)

    monkeypatch.setattr(fake_hub._Handler, "_json", lie)


def of_shard(**fields: Any) -> Change:
    """Change what the listing says of a shard."""
    return lambda info: next(s for s in info["siblings"] if s["rfilename"] == SHARD).update(fields)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (of_shard(size=1 << 60), "bytes"),
        (of_shard(size=7), "a header of"),
        (of_shard(size=0), "bytes"),
        (of_shard(size=-1), "size -1"),
        (of_shard(size="4096"), "size '4096'"),
        (of_shard(size=1e6), "size 1000000.0"),
        (lambda info: info.update(sha="../../../../secret"), "commit '../../../../secret'"),
        (lambda info: info.update(sha=None), "commit None"),
        (of_shard(rfilename="../model.safetensors"), "'..'"),
        (of_shard(rfilename="/etc/passwd"), "''"),
        (of_shard(rfilename="a/../../b.safetensors"), "'..'"),
        (of_shard(rfilename="x" * 300 + "\x1b[2J"), "\\x1b[2J"),
        (lambda info: info.update(siblings=[]), "no such file"),
    ],
)
def test_a_listing_that_lies(
    change: Change,
    found: str,
    model: dict[str, bytes],
    qplug: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing(monkeypatch, change)
    error = refused(qplug, "inspect", "them/model")
    assert found in error["found"]
    error = refused(qplug, "convert", "them/model", tmp_path / "out" / "target", "--to", "awq")
    assert found in error["found"]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def flipped(data: bytes) -> bytes:
    """Change the last byte of a tensor that decides nothing."""
    return data[:-1] + b"\1" if data.endswith(bytes(8)) else data


@pytest.mark.parametrize(
    "content", [flipped, lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""],
    ids=["a bit flipped", "short", "long", "empty"],
)  # fmt: skip
def test_content_that_is_not_what_was_announced(
    content: Callable[[bytes], bytes],
    model: dict[str, bytes],
    qplug: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the size or not: the hash of the listing decides, and nothing is written."""

    def lie(self: Any, oid: str) -> None:
        self._content(content(self.hub.blobs[oid]), {"ETag": f'"{oid}"'})

    monkeypatch.setattr(fake_hub._Handler, "blob", lie)
    error = refused(qplug, "convert", "them/model", tmp_path / "out" / "target", "--to", "awq")
    assert ".safetensors" in error["where"]
    assert error["fix"]
    assert not (tmp_path / "out" / "target").exists()


def redirected(monkeypatch: pytest.MonkeyPatch, to: Callable[[Any, str], str]) -> None:
    """Send whoever asks for a large file somewhere else."""
    honest = fake_hub._Handler._answer

    def lie(self: Any, status: int, data: bytes, headers: dict[str, str]) -> None:
        if status == 302:
            headers = {**headers, "Location": to(self, headers["Location"])}
        honest(self, status, data, headers)

    monkeypatch.setattr(fake_hub._Handler, "_answer", lie)


@pytest.mark.parametrize(
    "to",
    [
        lambda handler, there: handler.path,
        lambda handler, there: "file:///etc/passwd",
        lambda handler, there: "gopher://127.0.0.1/x",
        lambda handler, there: "http://127.0.0.1:1/x",
        lambda handler, there: "//",
    ],
    ids=["to itself", "to a file", "to another protocol", "to nobody", "to nothing"],
)
def test_redirects_that_lead_nowhere(
    to: Callable[[Any, str], str],
    model: dict[str, bytes],
    hub: FakeHub,
    qplug: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redirected(monkeypatch, to)
    error = refused(qplug, "inspect", "them/model")
    assert ".safetensors" in error["where"]
    error = refused(qplug, "convert", "them/model", tmp_path / "out" / "target", "--to", "awq")
    assert ".safetensors" in error["where"]
    assert not (tmp_path / "out" / "target").exists()
    assert not any(asked.token for asked in hub.asked if asked.large)


def test_a_second_redirect_gets_no_token_either(
    model: dict[str, bytes],
    hub: FakeHub,
    qplug: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the other host back to one that looks like the hub: what was dropped stays dropped."""

    def there_and_on(self: Any, oid: str) -> None:
        if "again" in self.query:
            self._content(self.hub.blobs[oid], {"ETag": f'"{oid}"'})
        else:
            self._answer(307, b"", {"Location": f"{self.hub.storage}/blobs/{oid}?again=1"})

    monkeypatch.setattr(fake_hub._Handler, "blob", there_and_on)
    assert qplug("inspect", "them/model").code == 0
    ran = qplug("convert", "them/model", tmp_path / "target", "--to", "awq")
    assert ran.code == 0, ran.err
    elsewhere = [asked for asked in hub.asked if asked.large]
    assert len(elsewhere) > 2
    assert {asked.token for asked in elsewhere} == {None}
