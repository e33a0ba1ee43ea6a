"""Where torch is not installed, the tests that need it, or what is built on it, are left out and counted: `tests/conftest.py` takes
this in there. A module or a test is left out for one reason alone: it fails, and what it says names the missing package."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest

_MISSING = re.compile(
    r"No module named '(torch|vllm|deepspeed)\b|No package metadata was found for (torch|vllm|deepspeed)\b"
    "|requires the PyTorch library"
)
_REAL_ENGINES = (
    *("actors/control", "actors/learner", "actors/reward", "actors/rollout", "actors/runtime", "actors/weights"),
    *("chaos", "end_to_end", "gpu", "kills"),
)
"""Folders of tests that start engines and learners."""
_left_out = {"modules": 0, "tests": 0}


def pytest_report_header() -> str:
    return (
        "torch is not installed: what needs it, vLLM or DeepSpeed is skipped, and so are "
        f"tests/{{{','.join(_REAL_ENGINES)}}}"
    )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if any(collection_path == Path(__file__).parent / folder for folder in _REAL_ENGINES) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, object]:
    report = yield
    return _skipped(report, "modules")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, object]:
    report = yield
    return _skipped(report, "tests")


def _skipped(report: pytest.CollectReport | pytest.TestReport, kind: str) -> pytest.CollectReport | pytest.TestReport:
    told = [str(report.longrepr), *(text for _, text in report.sections)]
    if report.failed and (found := _MISSING.search("\n".join(told))):
        report.outcome = "skipped"
        report.longrepr = (report.fspath, 0, f"Skipped: needs torch ({found[0]})")
        _left_out[kind] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = len(terminalreporter.stats.get("passed", ()))
    told = " and ".join(f"{count} {kind}" for kind, count in _left_out.items())
    terminalreporter.write_line(f"torch is not installed: {told} that need it were left out; {passed} tests passed")
