"""Errors that a user can fix. The command line prints their message alone; any other exception is a bug and prints its traceback.

Every message names the culprit, what it got, what it expected, and the fix.
"""


class GrpoRayError(Exception):
    """Base of all errors with a message for the user."""


class ConfigError(GrpoRayError, ValueError):
    """A recipe, an override or a combination of options cannot run."""


class DataError(GrpoRayError, ValueError):
    """A data set cannot be read or used; the message names file, line and column."""


class RewardError(GrpoRayError):
    """A reward function cannot be imported, or fails too often; the message names the function."""


class NoSignalError(GrpoRayError):
    """A run has nothing to learn from; the message says why, and what would change that."""


class JudgeError(RewardError):
    """A judge model cannot be reached, refuses, or gives an unusable reply; the message says which and why."""


class ResourceError(GrpoRayError):
    """The cluster lacks resources that the run requests; the message names them."""


class DeadlineError(GrpoRayError, TimeoutError):
    """An operation did not finish in time; the message names it and the option that sets the limit."""


class WorkerError(GrpoRayError):
    """An actor failed or died; the message names it, and its log file."""


class NoMemoryError(WorkerError):
    """An actor ran out of memory; the message says what took it, and which options reduce that."""


class PoisonedError(WorkerError):
    """A prompt crashes rollout engines; the message names it."""


class LostSamplesError(WorkerError):
    """Samples were lost with the node that held them, and have to be sampled again."""


class CheckpointError(GrpoRayError):
    """A checkpoint cannot be written or read."""


class StoreError(CheckpointError):
    """An object store refuses, or does not exist under that name; the message says which and why."""


class StoreAwayError(StoreError):
    """An object store does not answer; it may come back."""


class NonFiniteError(GrpoRayError):
    """A loss or a gradient is not finite; the message names the step, and the sample where it is known."""


def first_line(error: object) -> str:
    """The first line of an error's message, or its kind if the message is empty."""
    return next(iter(_lines(error)), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message: `ValueError: no digits`."""
    kind = type(error).__name__
    return ": ".join([kind, *_lines(error)[:1]])


def told(error: BaseException) -> str:
    """The first line of a library's error, and the next where the first only introduces it."""
    lines = _lines(error)
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)


def _lines(error: object) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
