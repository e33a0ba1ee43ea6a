"""Requests to an object store by fsspec, with errors of one line.

    ask(url, what, call)  ->  call(filesystem), retried for a while if the store does not answer

Stores go away and come back: a network, a rolling update, a rate limit. What they refuse (a key, a missing bucket) they refuse
again.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

from grpo_ray.errors import CheckpointError, StoreAwayError, StoreError, kind_and_line
from grpo_ray.plain_terminal import say

T = TypeVar("T")
PATIENCE_S = 60.0
"""How many seconds a command waits for a store that does not answer, where it could do nothing else meanwhile."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""The first and the longest wait between two attempts."""
WITHOUT_FOLDERS = frozenset(
    ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "cos", "r2", "tos"]
)
"""Protocols where a name with slashes needs no folder. If one were created all the same, so would be a mistyped bucket."""

_REFUSALS = (
    *("NoCredentials", "PartialCredentials", "ProfileNotFound", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("Unauthorized", "Forbidden", "AccessDenied", "ParamValidation", "InvalidRegion", "EndpointProvider"),
)
"""Parts of the names or beginnings of errors that mean a refusal, from clients that do not raise PermissionError."""
_HERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENAMETOOLONG}
"""Errors of this machine, not of the store."""


def is_url(path: str) -> bool:
    return "://" in path


def ask(
    url: str,
    what: str,
    call: Callable[[Any], T],
    *,
    patience_s: float = 0.0,
    tell: Callable[[str], None] | None = None,
) -> T:
    """Return the result of `call` with the store's filesystem.

    Args:
        what: the description of the call for messages: "list the checkpoints".
        patience_s: how long to retry while a store does not answer; 0: one attempt.
        tell: gets one line, the first time that it does not answer. None: stderr.

    Raises:
        FileNotFoundError: the store has no such object.
        StoreError: the store refuses.
        StoreAwayError: it did not answer.
        CheckpointError: there is no package for this kind of store.
    """
    give_up, wait_s, told = time.monotonic() + patience_s, FIRST_WAIT_S, False
    while True:
        try:
            return call(filesystem(url))
        except (FileNotFoundError, CheckpointError):
            raise
        except Exception as e:
            if is_refusal(e):
                _forget(url)
                raise StoreError(f"can't {what} in {url}: {reason(e)}") from None
            if (left_s := give_up - time.monotonic()) <= 0:
                waited = f" for {patience_s:g} s" if patience_s else ""
                raise StoreAwayError(f"{url} did not answer{waited}, asked to {what}: {reason(e)}") from None
            if not told:
                (tell or _to_stderr)(
                    f"{url} does not answer, asked to {what} ({reason(e)}); trying again for {patience_s:g} s"
                )
            told = True
        time.sleep(min(wait_s, left_s))
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def check_store(url: str, patience_s: float) -> None:
    """Check that a run may write to the store, before its workers start: a few bytes are written, listed and removed.

    Raises:
        StoreError: it refuses, or there is no such bucket.
        StoreAwayError: it does not answer.
    """
    probe = f"{url}/.grpo-ray-probe"

    def write(fs: Any) -> None:
        make_folder(fs, probe)
        fs.pipe_file(probe, b"grpo-ray")

    try:
        ask(url, "write", write, patience_s=patience_s)
        ask(url, "remove what was written", lambda fs: fs.rm_file(probe), patience_s=patience_s)
    except FileNotFoundError as e:
        raise StoreError(f"checkpoint.path {url}: {reason(e)}; make the bucket, or correct the name") from None
    except StoreAwayError as e:
        raise StoreAwayError(f"checkpoint.path: {e}; is its address right, and can this machine reach it?") from None
    except StoreError as e:
        raise StoreError(
            f"checkpoint.path: {e}; the run has to write, list, read and remove there: see the store's keys and permissions"
        ) from None


def make_folder(fs: Any, path: str) -> None:
    """Create the parent folder of `path`, in stores that have folders."""
    protocol = path.partition("://")[0]
    if protocol not in WITHOUT_FOLDERS:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def is_refusal(error: BaseException) -> bool:
    """Whether another attempt would give the same error."""
    if isinstance(error, OSError) and error.errno in _HERE:
        return True
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError):
        return True
    return any(word in type(error).__name__ or str(error).startswith(word) for word in _REFUSALS)


def reason(error: BaseException) -> str:
    """The reason of an error, in one line."""
    return kind_and_line(error)[:300]


def filesystem(url: str) -> Any:
    """The filesystem of a URL, without its cache of folders, which others change.

    Raises:
        CheckpointError: fsspec has nothing for that protocol.
    """
    from fsspec.core import url_to_fs

    try:
        found, _ = url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise CheckpointError(f"checkpoint.path {url}: {e}; install the fsspec package of that store") from None
    found.invalidate_cache()
    return found


def _forget(url: str) -> None:
    """Drop the cached client with its credentials: those of the next one may be new."""
    type(filesystem(url)).clear_instance_cache()


def _to_stderr(text: str) -> None:
    say(f"warning: {text}", error=True)
