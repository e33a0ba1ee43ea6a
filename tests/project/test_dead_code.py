"""What `make lint` takes for alive although no code reads it is still there, and still needs that."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from vulture import Vulture

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_name_and_decorator_that_vulture_leaves_out_is_of_something_that_it_would_report() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["vulture"]
    found = Vulture(ignore_decorators=options["ignore_decorators"])
    found.scavenge([str(ROOT / path) for path in options["paths"]], exclude=options["exclude"])
    reported = {item.name for item in found.get_unused_code()}
    assert [name for name in options["ignore_names"] if not any(fnmatch(each, name) for each in reported)] == []
    assert [path for path in options["exclude"] if not any(ROOT.glob(path.removeprefix("*/")))] == []
