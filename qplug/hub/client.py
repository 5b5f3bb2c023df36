"""The client of the hub, and what its errors say in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked so
    disable_progress_bars,
    logging,
)

from qplug_converters.errors import QplugError
from qplug_converters.version import __version__

PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be gone at the next attempt."""

Say = Callable[[str], None]
"""Takes a sentence for the user."""


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
        case errors.FileMetadataError():
            return QplugError(
                "an answer that is not a hub's", where, fix=f"is {constants.ENDPOINT} one?"
            )
        case errors.HFValidationError():
            return QplugError(str(error), where, "owner/name")
        case RuntimeError() if error.__cause__ is not None:  # of a thread that uploads
            return _explain(error.__cause__, where)
        case RuntimeError():  # of hf_xet, which has no other kind
            return QplugError(f"a transfer that failed ({error})", where, fix="try again")
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
    fix = "try again" if status in PASSING else "see whether a browser gets it"
    return QplugError(f"an answer that is no success ({said})", where, fix=fix)


def passing(error: Exception) -> bool:
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


def api() -> HfApi:
    """Return the client, with the user's token if there is one."""
    return HfApi(token=get_token(), library_name="qplug", library_version=__version__)
