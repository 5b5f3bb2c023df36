"""A model repository to be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from qplug_converters.errors import QplugError
from qplug_converters.source import Span, plain

from ..repository import Repository
from .client import api, told
from .source import HubSource


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
        If there is no token, it may not write there, or `private` is asked of a public one.
    """

    def __init__(self, repository: Repository, private: bool = False) -> None:
        self.repository = repository
        self._api = api()
        name, branch = repository.name, repository.revision
        with told(str(repository)):
            self._api.whoami()
            self._api.create_repo(name, private=private or None, exist_ok=True)
            if branch is not None:
                self._api.create_branch(name, branch=branch, exist_ok=True)
        now = HubSource(repository)
        if private and not now.private:
            raise QplugError(
                "a public repository",
                str(repository),
                "a private one",
                "choose a new name, or make it private in its settings",
            )
        self.files, self._parent = now.listed(), now.commit
        self.card = b""
        if "README.md" in self.files:
            self.card = now.read([Span("README.md", 0, now.size("README.md"))])[0]

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"{constants.ENDPOINT}/{self.repository.name}"

    def upload(self, path: Path, sha256: str) -> bool:
        """Upload a large file ahead of the commit that will name it.

        Returns `False` if the repository takes it as an ordinary file, which is part of a commit.
        """
        with told(str(self.repository)):
            operation = CommitOperationAdd(plain(path.name), str(path))
            operation.upload_info.sha256 = bytes.fromhex(sha256)
            self._api.preupload_lfs_files(
                self.repository.name, [operation], revision=self.repository.revision
            )
        return operation.path_or_fileobj == b""  # what the client says of an uploaded one

    def present(self, files: Mapping[str, Uploaded]) -> set[str]:
        """Return the names of those large files that are on the hub already."""
        if not files:
            return set()
        with told(str(self.repository)):
            found, _, _ = post_lfs_batch_info(
                [_upload_info(one) for one in files.values()],
                token=self._api.token if isinstance(self._api.token, str) else None,
                repo_type="model",
                repo_id=self.repository.name,
                revision=self.repository.revision,
                endpoint=constants.ENDPOINT,
            )
        there = {one["oid"] for one in found if one.get("actions") is None}
        return {name for name, one in files.items() if one.sha256 in there}

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
    operation.upload_info = _upload_info(data)
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def _upload_info(data: Uploaded) -> UploadInfo:
    return UploadInfo(size=data.size, sample=b"", sha256=bytes.fromhex(data.sha256))
