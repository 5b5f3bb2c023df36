"""A model hub on loopback: what huggingface_hub's own client asks of huggingface.co, and no more.

Two servers, as there: the hub itself, and another origin that holds large files (there a CDN),
which must never see a token. Everything is in memory; every request is recorded; any request can be
made to fail. The answers were written after those that huggingface_hub 1.0 and 2.4 read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from builders import GOLDEN, Command, Draft
from builders import Stored as Tensor

LARGE = (".safetensors", ".bin", ".gguf")
"""What goes to large file storage; the real hub reads .gitattributes and sizes."""


@dataclass(frozen=True)
class Stored:
    """One file of a commit; large ones are known by their hash alone."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_hash(self) -> str:
        held = self.data
        if self.large:
            held = f"oid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


@dataclass
class Commit:
    """A state of a repository."""

    files: dict[str, Stored]
    parent: str | None = None
    message: str = ""

    @property
    def sha(self) -> str:
        text = json.dumps([self.parent, self.message, {n: f.sha256 for n, f in self.files.items()}])
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """A repository: commits by hash, branches by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, commit: Commit, branch: str = "main") -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Asked:
    """A request as it arrived, and how much of an answer it got."""

    method: str
    path: str
    token: str | None
    range: str | None
    large: bool
    """Asked of the other origin."""
    sent: int = 0
    """Bytes of the answer's body."""
    received: int = 0
    """Bytes of the request's body."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD path` matches `pattern`."""

    pattern: str
    times: int = 1
    status: int = 0
    drop_after: int | None = None
    """Send this much of the answer, or read this much of the request, and hang up."""
    wait: float = 0.0
    whole: bool = False
    """Answer a range request with the whole file."""


class Refuse(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class FakeHub:
    """The hub; a context manager.

    Attributes
    ----------
    endpoint : str
        What `HF_ENDPOINT` should be.
    tokens : dict
        The user of each token that is known.
    repos : dict
        The repositories by `owner/name`.
    blobs : dict
        Large files that were uploaded, by sha256, whether a commit names them or not.
    asked : list of Asked
        Every request in order.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_writer": "me"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.watch: Callable[[], None] = lambda: None
        """Called at each request, before it is answered."""
        # Another host, and not only another port: some clients compare hosts alone.
        places = ((False, "127.0.0.1"), (True, "127.0.0.2"))
        self._servers = [_Server((h, 0), _handler(self, large)) for large, h in places]
        self.endpoint, self.storage = (
            f"http://{host}:{server.server_port}"
            for (_, host), server in zip(places, self._servers, strict=True)
        )

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # For tests ------------------------------------------------------------------------------

    def add(self, name: str, files: Mapping[str, bytes], **more: Any) -> str:
        """Make a repository, or a commit on its main branch that replaces all; return its hash."""
        repo = self.repos.setdefault(name, Repo(**more))
        stored = {n: Stored(data, n.endswith(LARGE)) for n, data in files.items()}
        return repo.commit(Commit(stored, repo.branches.get("main"), "by hand"))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository."""
        commit = self.repos[name].find(revision)
        assert commit is not None
        return {path: stored.data for path, stored in commit.files.items()}

    def fail(self, pattern: str, **what: Any) -> None:
        """Make the next requests that match go wrong; see `Fault`."""
        self.faults.append(Fault(pattern, **what))

    def fault(self, asked: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, asked):
                    fault.times -= 1
                    return fault
        return None

    def seen(self, pattern: str) -> list[Asked]:
        """Return the requests whose `METHOD path` matches."""
        return [a for a in self.asked if re.search(pattern, f"{a.method} {a.path}")]


class _Server(ThreadingHTTPServer):
    """Says nothing of a client that hangs up."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(hub: FakeHub, large: bool) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub, "large": large})


class _Handler(BaseHTTPRequestHandler):
    """Requests of either server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: FakeHub
    large: bool

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        authorization = self.headers.get("authorization")
        self.asked = Asked(
            self.command,
            unquote(url.path),
            authorization.removeprefix("Bearer ") if authorization else None,
            self.headers.get("range"),
            self.large,
        )
        self.hub.asked.append(self.asked)
        self.hub.watch()
        self.fault = self.hub.fault(f"{self.command} {unquote(url.path)}")
        try:
            if self.fault is not None:
                time.sleep(self.fault.wait)
            self.body = self._read_body()
            if self.fault is not None and self.fault.status:
                raise Refuse(self.fault.status, "made to fail")
            self._route(url.path)
        except Refuse as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": refusal.message}, refusal.status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        wanted = int(self.headers.get("content-length") or 0)
        drop = self.fault.drop_after if self.fault is not None else None
        data = self.rfile.read(wanted if drop is None or self.command != "PUT" else drop)
        self.asked.received = len(data)
        if drop is not None and self.command in ("PUT", "POST"):
            raise ConnectionError
        return data

    # Answers --------------------------------------------------------------------------------

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        drop = self.fault.drop_after if self.fault is not None else None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:drop])
            self.asked.sent = len(data[:drop])
        if drop is not None:
            raise ConnectionError

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self._answer(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}
        )

    def _content(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Answer with a file, or the part of it that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if wanted is None or (self.fault is not None and self.fault.whole):
            return self._answer(200, data, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if begin >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        part = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return self._answer(206, data[begin:end], {**headers, **part})

    def _user(self) -> str | None:
        """Return who asks; a token that is not known is refused, as there."""
        if self.asked.token is None:
            return None
        if self.asked.token not in self.hub.tokens:
            raise Refuse(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[self.asked.token]

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        mine = user is not None and user == name.split("/")[0]
        if repo is None or (repo.private and not mine):
            raise Refuse(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.gated and not mine:
            raise Refuse(403, "Access to this model is restricted", "GatedRepo")
        if write and not mine:
            raise Refuse(403 if user else 401, "you have no right to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(unquote(revision))
        if commit is None:
            raise Refuse(404, "Revision not found", "RevisionNotFound")
        return commit

    # Routes ---------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        for method, pattern, action in _ROUTES[self.large]:
            if method in (self.command, "GET" if self.command == "HEAD" else ""):
                found = re.fullmatch(pattern, path)
                if found is not None:
                    with self.hub.lock:
                        return getattr(self, action)(**found.groupdict())
        raise Refuse(404, f"nothing at {self.command} {path}")

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refuse(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None or not name.startswith(f"{user}/"):
            raise Refuse(403 if user else 401, "you have no right to create a repository here")
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=private)
        repo.commit(Commit({".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)}))
        return self._json({"url": f"{self.hub.endpoint}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if unquote(branch) in repo.branches:
            raise Refuse(409, "Reference already exists")
        repo.branches[unquote(branch)] = repo.branches["main"]
        self._json({})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(file.data), "blobId": file.git_hash}
            | ({"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": 134}}
               if file.large else {})
            for path, file in commit.files.items()
        ]  # fmt: skip
        if "blobs" not in self.query:
            siblings = [{"rfilename": s["rfilename"]} for s in siblings]
        self._json(
            {"_id": "1", "id": name, "modelId": name, "private": repo.private, "sha": commit.sha,
             "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": repo.gated}
        )  # fmt: skip

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(self._repo(name), revision)
        file = commit.files.get(unquote(path))
        if file is None:
            raise Refuse(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.git_hash}"'}
        if not file.large:
            return self._content(file.data, headers)
        self.hub.blobs[file.sha256] = file.data
        return self._answer(
            302,
            b"",
            {**headers, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)),
             "Location": f"{self.hub.storage}/blobs/{file.sha256}"},
        )  # fmt: skip

    def yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        commit = self._commit(self._repo(name, write=True), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large, there = file["path"].endswith(LARGE), commit.files.get(file["path"])
            oid = (there.sha256 if large else there.git_hash) if there is not None else None
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular",
                          "shouldIgnore": False, "oid": oid})  # fmt: skip
        self._json({"files": files})

    def batch(self, name: str) -> None:
        self._repo(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            actions = {
                "upload": {"href": f"{self.hub.storage}/upload/{oid}", "header": {}},
                "verify": {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"},
            }
            objects.append({**asked, **({} if oid in self.hub.blobs else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def verify(self, name: str) -> None:
        asked = json.loads(self.body)
        data = self.hub.blobs.get(asked["oid"])
        if data is None or len(data) != asked["size"]:
            raise Refuse(422, "the upload did not arrive")
        self._json({})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refuse(400, "the hash differs")
        self.hub.blobs[oid] = self.body
        self._answer(200, b"", {"ETag": f'"{oid}"'})

    def blob(self, oid: str) -> None:
        self._content(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        before = self._commit(repo, revision)
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", before.sha) != before.sha:
            raise Refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for line in lines:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = Stored(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refuse(400, "an LFS pointer pointed to a file that does not exist")
                files[path] = Stored(self.hub.blobs[value["oid"]], True)
            elif path in files:  # deletedFile
                del files[path]
            else:
                raise Refuse(400, f"no file {path} to delete")
        after = Commit(files, before.sha, header["value"]["summary"])
        repo.commit(after, unquote(revision))
        url = f"{self.hub.endpoint}/{name}/commit/{after.sha}"
        self._json({"success": True, "commitOid": after.sha, "commitUrl": url})


_NAME = r"(?P<name>[^/]+/[^/]+?)"
_ROUTES = {
    False: [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "yaml"),
        ("GET", rf"/api/models/{_NAME}", "info"),
        ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", "info"),
        ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{_NAME}\.git/info/lfs/verify", "verify"),
        ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ],
    True: [
        ("PUT", r"/upload/(?P<oid>[0-9a-f]+)", "upload"),
        ("GET", r"/blobs/(?P<oid>[0-9a-f]+)", "blob"),
    ],
}


def environment(hub: FakeHub, home: str, token: str | None = "hf_writer") -> dict[str, str]:
    """Return the variables with which a new process uses this hub and no other."""
    found = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_TOKEN": token or "",
    }
    return found


@contextmanager
def patched(hub: FakeHub, home: str, token: str | None = "hf_writer") -> Iterator[None]:
    """Make huggingface_hub use this hub in this process, where its constants are read already."""
    from unittest.mock import patch

    from huggingface_hub import constants

    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": f"{home}/hub",
        "HF_TOKEN_PATH": f"{home}/token",
    }
    with patch.multiple(constants, **values), patch.dict("os.environ", {"HF_TOKEN": token or ""}):
        yield


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def uploaded(
    folder: Path, golden: str = "gptq-4b-asym-g64", *, size: int = 4_000_000, count: int = 2
) -> dict[str, bytes]:
    """Make a model to be put on a hub: a golden in shards, the last with a large tensor."""
    draft = Draft.of(GOLDEN / golden)
    draft.files = {"tokenizer.json": b"{}", "README.md": b"# A model\n"}
    draft.tensors["model.rotary.table"] = Tensor.of(np.zeros(size // 4, np.float32))
    draft.save_sharded(folder, count)
    return content(folder)


def refused(qplug: Command, *arguments: object) -> dict[str, str]:
    """Run a command that must fail in one clear line; return its error."""
    ran = qplug(*arguments, "--json")
    assert ran.code == 1, ran
    assert ran.err.count("\nerror: ") + ran.err.startswith("error: ") == 1
    assert "Traceback" not in ran.err, ran.err
    error: dict[str, str] = ran.error
    assert error["where"]
    return error
