"""What the script `grpo-ray` calls. It lies in the package whose name no user has: a `launch.py` or `actors/` on PYTHONPATH would
be found first and run in the place of ours, so those two are imported from beside this one. By name: nothing here needs them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Signals are heard before anything that takes time is imported."""
    root = str(Path(__file__).parent.parent)
    sys.path.insert(0, root)
    try:
        import_module("launch.interrupts").install()
        search_path = import_module("actors.search_path")
    finally:
        sys.path.remove(root)
    search_path.settle()
    import_module("launch.cli").main()
    raise AssertionError("the command line has come back")
