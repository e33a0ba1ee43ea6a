"""launch/guide/security.md: what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "launch" / "guide" / "security.md"


def test_every_test_that_a_promise_names_exists() -> None:
    text = PAGE.read_text()
    defined = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = re.findall(r"`(test_\w+?)(_?\.\.)?`", text)
    assert len(named) > 15
    for name, cut in named:
        found = [d for d in defined if d.startswith(name)] if cut else [d for d in defined if d == name]
        assert found, name
    for file in re.findall(r"\b((?:\w+/)*test_\w+\.py)", text):
        assert (ROOT / "tests" / file).is_file(), file


def test_the_page_is_linked_and_every_row_of_a_promise_names_a_test() -> None:
    assert "(launch/guide/security.md)" in (ROOT / "README.md").read_text()
    assert "(guide/security.md)" in (ROOT / "launch" / "README.md").read_text()
    tables = re.findall(r"\| promise \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE.read_text())
    assert len(tables) >= 2
    for row in (row for table in tables for row in table.splitlines()):
        assert "test_" in row.split(" | ")[-1], row
