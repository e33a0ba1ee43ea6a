"""What is asked of an object store by fsspec, and the one line that says why there is no answer.

    ask(url, what, call)  ->  call(filesystem), tried again while the store does not answer, for a while

Stores go away and come back: a network, a rolling update, a limit of requests. What they refuse (a key, a bucket that is not
there) they refuse again.
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
"""How long a command waits for a store that does not answer, where nothing else could be done meanwhile."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Between two attempts, at first and at most."""
WITHOUT_FOLDERS = frozenset(
    ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "cos", "r2", "tos"]
)
"""Protocols where a name with slashes needs nothing above it. Made all the same, a mistyped bucket would come into being."""

_REFUSALS = (
    *("NoCredentials", "PartialCredentials", "ProfileNotFound", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("Unauthorized", "Forbidden", "AccessDenied", "ParamValidation", "InvalidRegion", "EndpointProvider"),
)
"""In the name of an error, or at its beginning, of clients that do not say it by PermissionError."""
_HERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENAMETOOLONG}
"""What goes wrong on this side."""


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
    """What `call` makes of the store's filesystem.

    Args:
        what: it does, for messages: "list the checkpoints".
        patience_s: for a store that does not answer; 0: it is asked once.
        tell: one line, the first time that it does not. None: on stderr.

    Raises:
        FileNotFoundError: there is no such thing in it.
        StoreError: it refuses.
        StoreAwayError: it did not answer.
        CheckpointError: there is no package for it.
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
    """That a run may write there, before its workers start: a few bytes are written, listed and removed.

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
    """Where `path` can lie, in stores that have folders."""
    protocol = path.partition("://")[0]
    if protocol not in WITHOUT_FOLDERS:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def is_refusal(error: BaseException) -> bool:
    """Would it be the same again?"""
    if isinstance(error, OSError) and error.errno in _HERE:
        return True
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError):
        return True
    return any(word in type(error).__name__ or str(error).startswith(word) for word in _REFUSALS)


def reason(error: BaseException) -> str:
    """One line."""
    return kind_and_line(error)[:300]


def filesystem(url: str) -> Any:
    """Without what it remembers of folders, which others change.

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
    """The client with the keys that it was made with: those of the next one may be new."""
    type(filesystem(url)).clear_instance_cache()


def _to_stderr(text: str) -> None:
    say(f"warning: {text}", error=True)
