"""A model repository as the source of a checkpoint."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked so
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from qplug_converters.errors import QplugError
from qplug_converters.source import PICKLES, Span, only_pickled, plain, read_span
from qplug_converters.version import __version__

from ..repository import Repository
from .client import Say, api, passing, told

TIMEOUT = 30.0
"""Seconds without an answer."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt at a range; then it is an error."""
THREADS = 8
"""Ranges asked for at a time."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    private : bool
        Whether only some can see it.
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
            info = api().model_info(
                repository.name,
                revision=repository.revision,
                files_metadata=True,
                timeout=TIMEOUT,
            )
        self.commit = info.sha or ""
        self.private = bool(info.private)
        if not _COMMIT.fullmatch(self.commit):
            raise QplugError(f"commit {info.sha!r}", str(repository), "a commit hash", "try again")
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
                size = sibling.size or 0
                if type(size) is not int or size < 0:
                    raise QplugError(
                        f"size {size!r} of {first}",
                        f"the listing of {repository}",
                        "a number of bytes",
                        "try again",
                    )
                self._files[first] = Listed(size, hash_, lfs is not None)
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
            cached = self._cached(name)
            if cached is not None:
                path.symlink_to(cached)
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

    def _cached(self, name: str) -> Path | None:
        """Return where the cache of huggingface_hub holds a file, if it does."""
        found = try_to_load_from_cache(self.repository.name, plain(name), revision=self.commit)
        path = Path(found).resolve() if isinstance(found, str) else None
        return path if path is not None and path.stat().st_size == self.size(name) else None

    def done(self, names: Iterable[str]) -> None:
        """Remove files that are not needed any more; the cache keeps its own."""
        with self._lock:
            for name in names:
                if not self._kept and name in self._here:
                    self.path(name).unlink(missing_ok=True)
                    self._here.discard(name)

    def sweep(self, names: Iterable[str]) -> None:
        """Remove what an earlier run left in the work folder, but for files of these names."""
        if self._kept or not self.folder.exists():
            return
        kept = set(names)
        for path in self.folder.iterdir():
            listed = self._files.get(path.name)
            if listed is not None and listed.large and path.name not in kept:
                self.done([path.name])
                path.unlink(missing_ok=True)
        for path in self.folder.rglob("*.incomplete"):  # of a client that was killed
            path.unlink(missing_ok=True)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Return ranges of bytes, several at a time."""
        if len(spans) < 2:
            return [self._range(span) for span in spans]
        with ThreadPoolExecutor(min(THREADS, len(spans))) as pool:
            return list(pool.map(self._range, spans))

    def _range(self, span: Span) -> bytes:
        """Read a range of bytes; what passes is tried again."""
        where = f"{self.title}: {span.name}"
        local = self.path(span.name) if self.here(span.name) else self._cached(span.name)
        if local is not None:
            return read_span(local, span)
        for wait in (*WAITS, None):
            try:
                with told(where) if wait is None else nullcontext():
                    return self._ask(span, where)
            except Exception as error:
                if wait is None or isinstance(error, QplugError):
                    raise
                if not passing(error):
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
