"""Errors that a user can mend. The command line prints their message alone; anything else is a bug and prints its traceback.

Every message names the culprit, what it got, what it expected, and the mend.
"""


class GrpoRayError(Exception):
    """Base of all errors with a message for the user."""


class ConfigError(GrpoRayError, ValueError):
    """A recipe, an override or a combination of options that can't run."""


class DataError(GrpoRayError, ValueError):
    """A data set that can't be read or used; names file, line and column."""


class RewardError(GrpoRayError):
    """A reward function that can't be imported, or fails too often; names the function."""


class NoSignalError(GrpoRayError):
    """A run that has nothing to learn from; says why, and what would change that."""


class JudgeError(RewardError):
    """A judge model that can't be reached, refuses, or does not answer as it was asked to; says which and why."""


class ResourceError(GrpoRayError):
    """The cluster lacks what the run asks for; says what is missing."""


class DeadlineError(GrpoRayError, TimeoutError):
    """Something did not finish in time; names it and the option that sets the limit."""


class WorkerError(GrpoRayError):
    """An actor failed or died; names it, and the log file that tells more."""


class NoMemoryError(WorkerError):
    """An actor that memory ran out for; says what took it, and which options lower that."""


class PoisonedError(WorkerError):
    """A prompt that ends rollout engines; names it."""


class LostSamplesError(WorkerError):
    """Samples that went with the node that held them: they have to be drawn again."""


class CheckpointError(GrpoRayError):
    """A checkpoint can't be written or read."""


class StoreError(CheckpointError):
    """An object store refuses, or is not there under that name; says which and why."""


class StoreAwayError(StoreError):
    """An object store that does not answer: it may come back."""


class NonFiniteError(GrpoRayError):
    """A loss or a gradient that is not a finite number; names the step, and the sample where it is known."""


def first_line(error: object) -> str:
    """The first line of what an error says; what kind it is where it says nothing."""
    return next(iter(_lines(error)), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """`ValueError: no digits`: the kind of an error and the first line of what it says."""
    kind = type(error).__name__
    return ": ".join([kind, *_lines(error)[:1]])


def told(error: BaseException) -> str:
    """The first line of a library's error, and the next where the first only announces it."""
    lines = _lines(error)
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)


def _lines(error: object) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
