"""Where torch is not installed a test is left out because it needs it, and for no other reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import without_torch


def report(text: str, *, log: str = "", outcome: str = "failed") -> Any:
    return SimpleNamespace(
        failed=outcome == "failed",
        outcome=outcome,
        longrepr=text,
        sections=[("Captured log call", log)],
        fspath="tests/test_x.py",
    )


@pytest.mark.parametrize(
    ("text", "log", "is_left_out"),
    [
        ("E   ModuleNotFoundError: No module named 'torch'", "", True),
        ("E   ModuleNotFoundError: No module named 'torch.nn'", "", True),
        ("E   importlib.metadata.PackageNotFoundError: No package metadata was found for torch", "", True),
        ("E   assert 1 == 0", "the run goes on: No module named 'torch'", True),
        ("AutoModel requires the PyTorch library but it was not found in your environment", "", True),
        ("E   ModuleNotFoundError: No module named 'torchvision'", "", False),
        ("E   ModuleNotFoundError: No module named 'distutils'", "", False),
        ("E   assert 'torch' in []", "torch is fine", False),
    ],
)
def test_what_fails_for_the_missing_package_is_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch, text: str, log: str, is_left_out: bool
) -> None:
    monkeypatch.setattr(without_torch, "_left_out", {"modules": 0, "tests": 0})
    found = without_torch._skipped(report(text, log=log), "tests")
    assert found.outcome == ("skipped" if is_left_out else "failed")
    assert without_torch._left_out == {"modules": 0, "tests": int(is_left_out)}


def test_what_passes_counts_as_passed_whatever_it_says() -> None:
    assert without_torch._skipped(report("No module named 'torch'", outcome="passed"), "tests").outcome == "passed"
