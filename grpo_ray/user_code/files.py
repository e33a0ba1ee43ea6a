"""Modules by their file, as in `rewards.py:mine`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FILE_MODULE = "reward_file_"
"""The prefix of the names of such modules."""


def file_module(file: Path) -> ModuleType:
    """The module of a file, imported once, whatever other modules have its name. Raises what the file raises."""
    known = f"{FILE_MODULE}{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known]
        raise
    return module
