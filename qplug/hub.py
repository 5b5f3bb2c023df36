"""Model repositories on a hub: read by ranges, fetched by files, written in one commit.

The only module that moves anything over a network, and all of it through huggingface_hub (1.0 to
2.x), whose settings hold: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, the cache. A revision
becomes a commit hash at the first request, and everything after is about that commit. File names
are other people's: each is checked before it is part of a path or of an address, because the
client's own calls follow `../` into other repositories with the user's token.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked so
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    logging,
)

from qplug_converters.errors import QplugError
from qplug_converters.source import PICKLES, Span, only_pickled, plain
from qplug_converters.version import __version__

from .repository import Repository

TIMEOUT = 30.0
"""Seconds without an answer."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt at a range; then it is an error."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be gone at the next attempt."""
THREADS = 8
"""Ranges asked for at a time."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

Say = Callable[[str], None]
"""Takes a sentence for the user."""


# Errors -----------------------------------------------------------------------------------------


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one line about `where`.

    Raises
    ------
    QplugError
        For everything that the hub or the network answers for; a bug stays what it is.
    """
    try:
        yield
    except QplugError:
        raise
    except Exception as error:
        known = _explain(error, where)
        if known is None:
            raise
        raise known from None


def _explain(error: BaseException, where: str) -> QplugError | None:
    """Return what an exception of the client says, or `None` if it is not about the hub."""
    name = where.partition("@")[0]
    login = "`hf auth login`, or set HF_TOKEN"
    match error:
        case errors.OfflineModeIsEnabled():
            return QplugError("HF_HUB_OFFLINE is set", where, "a connection", "unset it")
        case errors.LocalTokenNotFoundError():
            return QplugError("no token", where, "one", login)
        case errors.GatedRepoError():
            fix = f"ask for access at {constants.ENDPOINT}/{name}, then {login}"
            return QplugError("a gated repository", where, "access to it", fix)
        case errors.RepositoryNotFoundError():
            fix = f"check the name; a private one needs a token: {login}"
            return QplugError("no such folder and no such repository", where, "a model", fix)
        case errors.RevisionNotFoundError():
            return QplugError(
                "no such revision", where, "a branch, tag or commit", "check what follows the @"
            )
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            return _explain(error.__cause__, where)
        case errors.EntryNotFoundError():
            return QplugError("no such file", where, "what its listing names", "try again")
        case errors.HfHubHTTPError():
            return _explain_status(error, where, login)
        case errors.HFValidationError():
            return QplugError(str(error), where, "owner/name")
        case RuntimeError() if error.__cause__ is not None:  # of a thread that uploads
            return _explain(error.__cause__, where)
    kinds = {c.__name__ for c in type(error).__mro__ if c.__module__.startswith("httpx")}
    if kinds & {"TransportError", "TooManyRedirects"}:
        reason = str(error) or type(error).__name__
        return QplugError(
            f"no connection ({reason})", where, f"an answer of {constants.ENDPOINT}", "try again"
        )
    if isinstance(error, OSError) and error.errno is not None:
        fix = "make room, or see to the permissions"
        return QplugError(error.strerror or str(error), where, fix=fix)
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return QplugError("a file that arrived in part", where, "all of it", "try again")
    return None


def _explain_status(error: errors.HfHubHTTPError, where: str, login: str) -> QplugError:
    """Return what an HTTP status says."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    said = f"status {status}" + (f": {said}" if said else "")
    match status:
        case 401:
            return QplugError(f"a token that is not accepted ({said})", where, "a valid one", login)
        case 403:
            fix = f"use a token that may write to {where.partition('/')[0]}, or push elsewhere"
            return QplugError(f"no right to do this ({said})", where, "a right to write", fix)
        case 409 | 412:
            return QplugError(f"a change by somebody else ({said})", where, fix="try again")
    fix = "try again" if status in PASSING else ""
    return QplugError(f"an answer that is no success ({said})", where, fix=fix)


def _passing(error: Exception) -> bool:
    """Whether an error may be gone at the next attempt."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in PASSING
    return any(c.__name__ == "TransportError" for c in type(error).__mro__)


def quiet(bars: bool) -> None:
    """Let the client say nothing of its own in this process, but show bars where they are wanted.

    What it would warn of comes out as an error of ours, or was tried again and went well.
    """
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not bars:
        disable_progress_bars()


def _api() -> HfApi:
    return HfApi(token=get_token(), library_name="qplug", library_version=__version__)


# Reading ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says of a file; the hash is the sha256 of large files, else git's."""

    size: int
    hash: str
    large: bool

    def holds(self, path: Path) -> bool:
        """Whether a local file is this one, by its size and hash."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            if self.large:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.hash
            content = file.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.hash


class HubSource:
    """A model repository as the source of a checkpoint, at one commit.

    Attributes
    ----------
    repository : Repository
        As it was asked for.
    commit : str
        The commit hash that its revision was when it was opened.
    folder : Path
        Where fetched files lie: `work`, to be removed one by one, or a snapshot in the cache of
        huggingface_hub, which keeps them.
    fetched : int
        Bytes that were read by ranges.

    Raises
    ------
    QplugError
        If the repository cannot be read, or its listing holds a name that leads elsewhere.
    """

    def __init__(
        self, repository: Repository, work: Path | None = None, say: Say | None = None
    ) -> None:
        self.repository = repository
        self.fetched = 0
        self._say = say
        self._kept = work is None
        self._lock = threading.Lock()
        self._here: set[str] = set()
        with told(str(repository)):
            info = _api().model_info(
                repository.name,
                revision=repository.revision,
                files_metadata=True,
                timeout=TIMEOUT,
            )
        self.commit = info.sha or ""
        if not _COMMIT.fullmatch(self.commit):
            raise QplugError(f"commit {info.sha!r}", str(repository), "a commit hash")
        self._files: dict[str, Listed] = {}
        self._folders: set[str] = set()
        for sibling in info.siblings or ():
            first, *below = sibling.rfilename.split("/")
            with self._about_the_listing():
                plain(first)
                for part in below:
                    plain(part)
            if below:
                self._folders.add(f"{first}/")
            else:
                lfs = sibling.lfs
                hash_ = lfs.sha256 if lfs is not None else sibling.blob_id or ""
                self._files[first] = Listed(sibling.size or 0, hash_, lfs is not None)
        cache = Path(constants.HF_HUB_CACHE).expanduser()
        named = repo_folder_name(repo_id=repository.name, repo_type="model")
        self.folder = work if work is not None else cache / named / "snapshots" / self.commit

    @contextmanager
    def _about_the_listing(self) -> Iterator[None]:
        try:
            yield
        except QplugError as error:
            error.where = f"the listing of {self.repository}"
            raise

    @property
    def title(self) -> str:
        """The repository at its commit, as `qplug` takes it."""
        return f"{self.repository.name}@{self.commit}"

    @property
    def origin(self) -> dict[str, str]:
        """The repository and its commit."""
        return {"repository": self.repository.name, "revision": self.commit}

    def names(self) -> list[str]:
        """Return the names of the files, sorted; that of a folder ends in `/`."""
        return sorted([*self._files, *self._folders])

    def listed(self) -> Mapping[str, Listed]:
        """Return what the listing says of each file that lies in no folder."""
        return self._files

    def path(self, name: str) -> Path:
        """Return where a file lies, or will lie."""
        if plain(name) not in self._files:
            pickled = [n for n in self._files if n.endswith(PICKLES)]
            if name.endswith(".safetensors") and pickled:
                raise only_pickled(pickled[0], self.title)
            raise QplugError(
                "no such file", f"{self.title}: {name}", "config.json and safetensors files"
            )
        return self.folder / name

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        self.path(name)
        return self._files[name].size

    def here(self, name: str) -> bool:
        """Whether a file was fetched."""
        if name not in self._here and self._kept and self.path(name).exists():
            self._here.add(name)
        return name in self._here

    def need(self, names: Iterable[str]) -> None:
        """Fetch what is not here of these files, and check what came against the listing."""
        with self._lock:
            for name in names:
                if not self.here(name):
                    with told(f"{self.title}: {name}"):
                        self._fetch(name)
                    self._here.add(name)

    def _fetch(self, name: str) -> None:
        path, listed = self.path(name), self._files[name]
        if not self._kept:
            if path.exists() and listed.holds(path):  # from before an interruption
                return
            path.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            cached = try_to_load_from_cache(self.repository.name, name, revision=self.commit)
            if isinstance(cached, str):
                path.symlink_to(Path(cached).resolve())
                return
        if self._say is not None and listed.large:
            self._say(f"fetching {name} ({listed.size / 1e6:,.1f} MB)")
        hf_hub_download(
            self.repository.name,
            name,
            revision=self.commit,
            local_dir=None if self._kept else self.folder,
            library_name="qplug",
            library_version=__version__,
            token=get_token(),
            endpoint=constants.ENDPOINT,
        )
        if not listed.holds(path):
            if not self._kept:
                path.unlink()
            raise QplugError(
                "a file that differs from its listing",
                f"{self.title}: {name}",
                f"{'sha256' if listed.large else 'git hash'} {listed.hash}",
                "try again",
            )

    def done(self, names: Iterable[str]) -> None:
        """Remove files that are not needed any more; the cache keeps its own."""
        with self._lock:
            for name in names:
                if not self._kept and name in self._here:
                    self.path(name).unlink(missing_ok=True)
                    self._here.discard(name)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Return ranges of bytes, several at a time."""
        if len(spans) < 2:
            return [self._range(span) for span in spans]
        with ThreadPoolExecutor(min(THREADS, len(spans))) as pool:
            return list(pool.map(self._range, spans))

    def _range(self, span: Span) -> bytes:
        """Read a range of bytes; what passes is tried again."""
        where = f"{self.title}: {span.name}"
        if self.here(span.name):
            with self.path(span.name).open("rb") as file:
                file.seek(span.begin)
                return file.read(span.end - span.begin)
        for wait in (*WAITS, None):
            try:
                with told(where) if wait is None else _nothing():
                    return self._ask(span, where)
            except Exception as error:
                if wait is None or isinstance(error, QplugError):
                    raise
                if not _passing(error):
                    with told(where):
                        raise
                time.sleep(wait)
        raise AssertionError

    def _ask(self, span: Span, where: str) -> bytes:
        """Ask for a range of bytes once; a redirect to another host gets no token (httpx)."""
        wanted = span.end - span.begin
        headers = build_hf_headers(
            token=get_token(), library_name="qplug", library_version=__version__
        )
        headers |= {"Range": f"bytes={span.begin}-{span.end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(
            self.repository.name,
            plain(span.name),
            revision=self.commit,
            endpoint=constants.ENDPOINT,
        )
        found = bytearray()
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            whole = wanted == self._files[span.name].size
            if response.status_code != 206 and not whole:
                raise QplugError(
                    f"the whole file (status {response.status_code})",
                    where,
                    f"{wanted} bytes of it",
                    "give a folder: `hf download` fetches one",
                )
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) > wanted:
                    break
        with self._lock:
            self.fetched += len(found)
        if len(found) != wanted:
            raise QplugError(f"{len(found)} bytes", where, f"{wanted}", "try again")
        return bytes(found)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# Writing ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A large file that is on the hub, but perhaps in no commit yet."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did."""

    url: str
    commit: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    changed: bool
    """Whether the repository was different before."""


class Target:
    """A repository to be written: made if there is none, and changed in one commit.

    Attributes
    ----------
    repository : Repository
        Its name, and the branch, if it is not the main one.
    files : mapping
        What it holds now, by name.
    card : bytes
        Its README.md, if it has one.

    Raises
    ------
    QplugError
        If there is no token, or it may not write there.
    """

    def __init__(self, repository: Repository, private: bool = False) -> None:
        self.repository = repository
        self._api = _api()
        name, branch = repository.name, repository.revision
        with told(str(repository)):
            self._api.whoami()
            self._api.create_repo(name, private=private or None, exist_ok=True)
            if branch is not None:
                self._api.create_branch(name, branch=branch, exist_ok=True)
        now = HubSource(repository)
        self.files, self._parent = now.listed(), now.commit
        self.card = b""
        if "README.md" in self.files:
            self.card = now.read([Span("README.md", 0, now.size("README.md"))])[0]

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"{constants.ENDPOINT}/{self.repository.name}"

    def push(
        self, files: Mapping[str, Path | bytes | Uploaded], stale: Iterable[str], message: str
    ) -> Pushed:
        """Upload files and delete others, in one commit; what the hub has already is not sent.

        Raises
        ------
        QplugError
            If it is refused, somebody else committed meanwhile, or the connection is gone. What
            has been uploaded is recognised when the same is pushed again.
        """
        deleted = tuple(stale)
        with told(str(self.repository)):
            operations = [
                _addition(plain(name), data)
                for name, data in files.items()
                if not (isinstance(data, Uploaded) and self._has(name, data))
            ]
            done = self._api.create_commit(
                self.repository.name,
                [*operations, *(CommitOperationDelete(plain(name)) for name in deleted)],
                commit_message=message,
                revision=self.repository.revision,
                parent_commit=self._parent,
            )
        changed = done.oid != self._parent
        return Pushed(self.url, done.oid, tuple(files), deleted, changed)

    def _has(self, name: str, data: Uploaded) -> bool:
        """Whether the branch holds this very file."""
        return name in self.files and self.files[name].hash == data.sha256


def _addition(name: str, data: Path | bytes | Uploaded) -> CommitOperationAdd:
    """Return the operation that adds a file."""
    if not isinstance(data, Uploaded):
        return CommitOperationAdd(name, str(data) if isinstance(data, Path) else data)
    operation = CommitOperationAdd(name, b"")
    # What `preupload_lfs_files` leaves behind; there is no public way to say it of a file that
    # was uploaded by another process and is no longer here.
    operation.upload_info = UploadInfo(
        size=data.size, sample=b"", sha256=bytes.fromhex(data.sha256)
    )
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation
