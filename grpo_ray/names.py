"""Names of runs: they become folders, actors' names, labels of metrics and words of commands, so little is allowed in them."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_ray.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str = "name") -> str:
    """The name itself, checked. Raises ConfigError for one that would mean something to a shell, a path or a URL."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name[:120]!r} can't be used; take up to 100 letters, digits, . _ and -, beginning with a letter or digit"
        )
    return name


def run_name(run_dir: Path) -> str:
    """The name of the run in this folder on the cluster. Raises ConfigError for a folder name that is not allowed."""
    return check_name(run_dir.name.lstrip("."), "the run's name")
