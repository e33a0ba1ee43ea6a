"""The order of the import path: grpo-ray's own packages and the libraries come before the folder that a run is started from.

A user may have an `actors.py`, `random.py` or `datasets/` beside the recipe; found first, it would run in place of ours. Ray
puts that folder first in every worker, and Python does in every process that is started with `-c` or `-m`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("grpo_ray", "actors", "launch")
ROOT = str(Path(__file__).parent.parent)
IMPORT_GC_THRESHOLD = 50_000
"""The number of surviving new objects between two runs of the garbage collector. By Python's own number, 700, it scans a thousand
times what an import of torch and Transformers creates, none of which is ever freed: a quarter of its time."""


LIBRARIES = (
    *("ray", "torch", "vllm", "deepspeed", "transformers", "datasets", "huggingface_hub", "tokenizers", "safetensors"),
    *(
        "numpy",
        "pyarrow",
        "pandas",
        "pydantic",
        "yaml",
        "typer",
        "click",
        "rich",
        "jinja2",
        "requests",
        "aiohttp",
        "grpc",
    ),
    *(
        "msgspec",
        "fsspec",
        "psutil",
        "openai",
        "math_verify",
        "sympy",
        "reasoning_gym",
        "tensorboard",
        "plotly",
        "peft",
    ),
)
"""The names that a run imports, and that a user's file or folder may have as well."""


def settle() -> None:
    """Order the path of a command's process before it imports anything else: our packages, then libraries, then the user's folder.

    Raises:
        SystemExit: a file on PYTHONPATH hides a module of Python or a library.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the folder that this command is started in does not exist any more; go to another")
    ours = {os.path.realpath(p) for p in (ROOT, os.path.dirname(os.__file__))}
    kept = []
    for folder in os.environ["PYTHONPATH"].split(os.pathsep) if os.environ.get("PYTHONPATH") else ():
        # An empty entry is the current folder, which comes last anyway; but Ray's own processes would have it first.
        in_front = [] if os.path.realpath(folder) in ours else list(hiding(folder or here))
        if in_front and os.path.realpath(folder) != os.path.realpath(here):
            print(f"error: {hidden_by(in_front[0])}, or take {folder} off PYTHONPATH", file=sys.stderr)
            sys.exit(2)
        if not in_front:
            kept.append(folder)
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
    bind_ours()
    keep_behind(here)


def hiding(folder: str) -> Iterator[str]:
    """The files in a folder that would be imported in place of Python's own modules or of libraries, if it were searched first."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name, suffix = os.path.splitext(entry.name)
        if suffix == ".py":
            hides = name in sys.stdlib_module_names or name in LIBRARIES
        else:
            hides = entry.name in sys.stdlib_module_names and os.path.isfile(os.path.join(entry.path, "__init__.py"))
        if hides:
            yield entry.path


def hidden_by(file: str) -> str:
    name = os.path.splitext(os.path.basename(file))[0]
    whose = "Python's own module" if name in sys.stdlib_module_names else "the library"
    return f"{file} would be imported in the place of {whose} {name}: rename it"


def bind_ours() -> None:
    """Import our packages, whatever the search path is, and let processes that inherit it find them, too."""
    sys.path.insert(0, ROOT)
    try:
        for name in PACKAGES:
            importlib.import_module(name)
    finally:
        sys.path.remove(ROOT)
    if ROOT not in sys.path:
        sys.path.append(ROOT)


def keep_behind(folder: str) -> None:
    """Keep the user's folder at the end of the search path, also when it is put first later."""
    behind = _Behind(folder)
    behind.reorder()
    sys.meta_path.insert(0, behind)


class _Behind:
    """An entry of `sys.meta_path` that finds nothing, and moves a folder back to the end of `sys.path` before others look for a
    module."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(self, _fullname: str, path: Sequence[str] | None, _target: Any = None) -> None:
        if path is None:
            self.reorder()

    def reorder(self) -> None:
        if sys.path[-1:] != [self._folder] or sys.path.count(self._folder) > 1:
            sys.path[:] = [*(p for p in sys.path if p not in (self._folder, "")), self._folder]


def worker_env(folder: str) -> dict[str, Any]:
    """Ray's `runtime_env` of a job: each worker process searches our packages and its libraries before the user's folder.

    Args:
        folder: the user's folder, where a run is started.
    """
    return {"worker_process_setup_hook": _hook(ROOT, folder, IMPORT_GC_THRESHOLD), "env_vars": {"PYTHONSAFEPATH": "1"}}


def _hook(root: str, folder: str, seldom: int) -> Callable[[], None]:
    """The hook as code: by name, a worker would have to import it first, and might find the user's module."""

    def first_of_all() -> None:
        import gc
        import sys

        gc.set_threshold(seldom)
        sys.path.insert(0, root)
        try:
            from actors.search_path import bind_ours, keep_behind
        finally:
            sys.path.remove(root)
        bind_ours()
        keep_behind(folder)

    return first_of_all
