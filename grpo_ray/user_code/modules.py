"""The explanation if a user's module is not the one that was imported: another of its name comes first."""

from __future__ import annotations

import sys
from pathlib import Path

OURS = ("grpo_ray", "actors", "launch")


def name_taken(module: str) -> str | None:
    """One sentence on what else has the first name of this dotted path, if the current folder has it too; None if it has not, or if
    that is what was imported."""
    top = module.partition(".")[0]
    here = Path.cwd()
    mine = next((path for path in (here / f"{top}.py", here / top) if path.exists()), None)
    loaded = sys.modules.get(top)
    if loaded is None or (mine is None and top not in OURS):
        return None
    file = getattr(loaded, "__file__", None)
    if mine is not None and file is not None and Path(file).is_relative_to(here):
        return None
    whose = (
        "grpo-ray's own package"
        if top in OURS
        else "Python's own module"
        if top in sys.stdlib_module_names
        else "a library"
    )
    return f"the name {top} is taken by {whose} ({file or 'built in'}); rename " + (
        str(mine) if mine is not None else f"your {top}"
    )
