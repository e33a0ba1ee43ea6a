"""Entry point of the script `grpo-ray`. It is in the package whose name no user has: a `launch.py` or `actors/` on PYTHONPATH
would be found first and run instead of ours, so those two are imported from beside this one, by name, since nothing here depends
on them."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

SLOW_TO_LEAVE = ("ray", "torch")
"""Packages after which an orderly exit of the interpreter takes seconds. Ray is shut down by the code that started it."""


def main() -> NoReturn:
    """Run the command line. Signal handlers are installed before slow imports; objects that end with the process are not torn
    down."""
    root = str(Path(__file__).parent.parent)
    sys.path.insert(0, root)
    try:
        interrupts = import_module("launch.interrupts")
        interrupts.install()
        search_path = import_module("actors.search_path")
    finally:
        sys.path.remove(root)
    search_path.settle()
    try:
        import_module("launch.cli").main()
        raise AssertionError("the command line has come back")
    except SystemExit as end:
        if isinstance(end.code, int | None) and any(name in sys.modules for name in SLOW_TO_LEAVE):
            interrupts.run_last()
            _leave(end.code or 0)
        raise


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
