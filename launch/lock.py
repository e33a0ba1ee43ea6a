"""One lock file for each stack, for every Python that the project supports: `make lock`.

A package that is not the same under all of them has a line for each, with a marker; uv's own universal resolution goes beyond the
newest Python that has wheels. The pins of an earlier lock are kept where they still fit.

A package whose wheel for one of them is unavailable (torch's CPU builds may exist for one alone) is resolved by what its build
that is installed here requires. Where that does not work either, the lock's lines for that Python stay, which is reported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from grpo_ray.errors import ConfigError
from grpo_ray.plain_terminal import say

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
STACKS = {"cpu": [], "gpu": ["--no-config", "--python-platform", "x86_64-manylinux_2_28"]}
"""Name -> how its packages are resolved."""


def merged(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a lock file.

    Args:
        resolved: Python -> package -> version.
    """
    lines = []
    for name in sorted({name for of_one in resolved.values() for name in of_one}):
        found = {python: of_one.get(name) for python, of_one in resolved.items()}
        if len(set(found.values())) == 1:
            lines.append(f"{name}=={next(iter(found.values()))}")
            continue
        for version in dict.fromkeys(v for v in found.values() if v is not None):
            where = " or ".join(f"python_version == '{python}'" for python, v in found.items() if v == version)
            lines.append(f"{name}=={version} ; {where}")
    return lines


def pinned(text: str, python: str | None = None) -> dict[str, str]:
    """Package -> version, from a lock file.

    Args:
        python: the Python whose lines to read; None: the file is for one Python.
    """
    lines = [line.partition(" ; ") for line in text.splitlines() if "==" in line]
    found = [line for line, _, marker in lines if not marker or python is None or f"'{python}'" in marker]
    return dict(line.split("==", 1) for line in found)


class UnresolvedError(Exception):
    """The error message of uv."""


_NO_WHEEL = re.compile(r"Because ([\w.-]+)==(\S+) has no wheels with a matching Python ABI tag")


def resolve(stack: str, python: str, lock: Path) -> dict[str, str]:
    """Package -> version, for one Python. Raises UnresolvedError: there is no solution."""
    without: dict[str, str] = {}
    while True:
        try:
            return _compiled(stack, python, lock, without) | without
        except UnresolvedError as e:
            found = _NO_WHEEL.search(" ".join(str(e).split()))
            if found is None or found[1] in without or _version_here(found[1]) != found[2]:
                raise
            without[found[1]] = found[2]
            say(
                f"{lock.name}: no wheel of {found[1]} {found[2]} for Python {python} is at hand; resolved by what the one that is "
                "installed here requires"
            )


def _compiled(stack: str, python: str, lock: Path, without: dict[str, str]) -> dict[str, str]:
    """Package -> version, as uv resolves them for one Python.

    Args:
        without: packages that are left out, except for what they require.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, overrides, more = folder / lock.name, folder / "overrides.txt", folder / "more.txt"
        # uv prefers the versions that are already in the output file.
        out.write_bytes(lock.read_bytes())
        overrides.write_text("".join(f"{package}; sys_platform == 'never'\n" for package in without))
        more.write_text("".join(f"{line}\n" for package in without for line in metadata.requires(package) or ()))
        command = [_uv(), "pip", "compile", "-q", "pyproject.toml", str(more)]
        options = ["--extra", stack, "--extra", "dev", "--no-header", "--no-annotate", "--python-version", python]
        command += [*options, *STACKS[stack], "--overrides", str(overrides), "-o", str(out)]
        done = subprocess.run(
            command, cwd=lock.parent, env=os.environ | {"NO_COLOR": "1"}, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise UnresolvedError(done.stderr)
        return pinned(out.read_text())


def _uv() -> str:
    """The path of uv: beside this Python, or on the path. Raises ConfigError: there is none."""
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise ConfigError(
            "uv resolves the lock files, and is neither beside this Python nor on the path: pip install uv"
        )
    return found


def _version_here(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def resolve_all(stack: str, lock: Path) -> list[str]:
    """Rewrite a lock file; returns the Pythons whose lines are unchanged."""
    before = lock.read_text()
    resolved, kept = {}, []
    for python in VERSIONS:
        try:
            resolved[python] = resolve(stack, python, lock)
        except UnresolvedError as e:
            resolved[python] = pinned(before, python)
            kept.append(python)
            say(
                f"{lock.name}: not resolved for Python {python}, whose lines stay as they are. uv says:\n{e}",
                error=True,
            )
    lines = merged(resolved)
    lock.write_text("\n".join(lines) + "\n")
    say(f"{lock.name}: {len(lines)} lines" + (f"; not resolved anew: Python {', '.join(kept)}" if kept else ""))
    return kept


def main() -> None:
    """Write the lock files; the exit code is 1 where one could not be rewritten entirely."""
    kept = [resolve_all(stack, ROOT / f"lock-{stack}.txt") for stack in STACKS]
    sys.exit(int(any(kept)))


if __name__ == "__main__":
    main()
