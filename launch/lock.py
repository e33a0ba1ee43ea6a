"""One lock file for each stack, for every Python that the project takes: `make lock`.

A package that is not the same under all of them has a line for each, with a marker; uv's own universal resolution goes beyond the
newest Python that has wheels. What an earlier lock says is kept where it still fits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

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


def pinned(text: str) -> dict[str, str]:
    """Package -> version, of a lock file for one Python."""
    return dict(line.split("==", 1) for line in text.splitlines() if "==" in line)


def resolve(stack: str, python: str, lock: Path) -> dict[str, str]:
    """Raises CalledProcessError when there is no solution; uv has said why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / lock.name
        # What is there already is what uv prefers.
        out.write_bytes(lock.read_bytes())
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "-q", "pyproject.toml", *STACKS[stack]]
        options = ["--extra", stack, "--extra", "dev", "--no-header", "--no-annotate", "--python-version", python]
        subprocess.run([*command, *options, "-o", str(out)], cwd=ROOT, check=True)
        return pinned(out.read_text())


def main() -> None:
    for stack in STACKS:
        lock = ROOT / f"lock-{stack}.txt"
        lines = merged({python: resolve(stack, python, lock) for python in VERSIONS})
        lock.write_text("\n".join(lines) + "\n")
        print(f"{lock.name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
