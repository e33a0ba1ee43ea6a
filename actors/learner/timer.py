"""The time of a learner rank: spans of its activity, and the seconds of each phase of an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from grpo_ray.telemetry.activity import Activity

PHASES = ("fetch", "old", "reference", "critic", "forward_backward", "step")


class HasActivity(Protocol):
    """An object whose methods may be traced."""

    activity: Activity


A = TypeVar("A", bound=HasActivity)
P = ParamSpec("P")
R = TypeVar("R")


def traced(name: str) -> Callable[[Callable[Concatenate[A, P], R]], Callable[Concatenate[A, P], R]]:
    """Decorator of methods: each call is a span of the object's activity."""

    def decorate(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
        @wraps(method)
        def call(self: A, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with self.activity.span(name):
                return method(self, *args, **kwargs)

        return call

    return decorate


class UpdateTimer:
    """The seconds of an update's phases; each phase is a span of the activity as well."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self._activity.span(name):
            yield
        self._seconds[name] += time.monotonic() - started

    @property
    def total_s(self) -> float:
        return sum(self._seconds.values())

    def metrics(self) -> dict[str, float]:
        return {f"update/{name}_s": seconds for name, seconds in self._seconds.items()}
