"""Files that are read at one sitting: none is over 400 lines, and no class over 300."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE, MAX_CLASS = 400, 300


def too_large(path: Path) -> Iterator[str]:
    text = path.read_text()
    if (lines := text.count("\n")) > MAX_FILE:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_CLASS:
            yield f"class {node.name} of {lines} lines"


def test_no_file_and_no_class_is_larger_than_is_read_at_one_sitting() -> None:
    files = [file for package in ("grpo_ray", "actors", "launch") for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 200
    found = {str(file.relative_to(ROOT)): list(too_large(file)) for file in files}
    assert {name: why for name, why in found.items() if why} == {}


def test_what_is_too_large_is_found(tmp_path: Path) -> None:
    file = tmp_path / "large.py"
    file.write_text("class A:\n" + "    x = 1\n" * 300 + "y = 2\n" * 99)
    assert list(too_large(file)) == ["class A of 301 lines"]
    file.write_text("class A:\n" + "    x = 1\n" * 299 + "y = 2\n" * 101)
    assert list(too_large(file)) == ["401 lines"]
