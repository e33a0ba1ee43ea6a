"""A pytest plugin for mutmut's runs: of the tests that call a mistaken function the quickest come first, and have a few seconds
together. So most mistakes are noticed within milliseconds, and one that only a longer test would notice counts as unnoticed."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
from pathlib import Path

import pytest

BUDGET_S = 20.0
STATS = Path("mutmut-stats.json").resolve()
FAILED = Path("mutmut-failed.txt").resolve()
"""Tests that fail without a mistake, and how: mutmut tells neither."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "__mutmut_" not in os.environ.get("MUTANT_UNDER_TEST", ""):
        return
    took = _seconds()
    items.sort(key=lambda item: took.get(item.nodeid, 0.0))
    until = itertools.accumulate(took.get(item.nodeid, 0.0) for item in items)
    num_kept = max(1, sum(seconds <= BUDGET_S for seconds in until))
    config.hook.pytest_deselected(items=items[num_kept:])
    del items[num_kept:]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and os.environ.get("MUTANT_UNDER_TEST") in ("", "stats"):
        with FAILED.open("a") as file:
            file.write(f"{report.nodeid}\n{report.longreprtext}\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """mutmut forks the run of each mistake from a process that has only collected: what that made is never garbage."""
    if session.config.option.collectonly:
        gc.freeze()


@functools.cache
def _seconds() -> dict[str, float]:
    """What each test took when mutmut saw which functions it calls."""
    durations: dict[str, float] = json.loads(STATS.read_text())["duration_by_test"]
    return durations
