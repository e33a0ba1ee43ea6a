"""What `submit` ships: the user's folder and this grpo-ray, copied side by side into one folder that Ray uploads.

The cluster's image has the dependencies. That our own packages come along too means that both sides run the same version.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.search_path import PACKAGES, hidden_by, hiding
from grpo_ray.errors import ConfigError

LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "node_modules"),
    *("runs", "wandb", "mlruns", "*.pem", "*.key", "id_rsa*", "id_ed25519*"),
)
"""Patterns of names, at any depth. Hidden files are where keys and tokens lie. A folder with a pyvenv.cfg is left out too."""
LIMIT_BYTES = 200 << 20
"""Ray keeps the upload in the memory of the head node, and refuses above half a GB."""
LARGEST_NAMED = 3


def stage(folder: Path, into: Path, exclude: Sequence[str] = (), limit_bytes: int = LIMIT_BYTES) -> int:
    """Fill `into`; the bytes of the user's part.

    Raises:
        ConfigError: the folder is too large, or holds something that would hide grpo-ray.
    """
    ours = Path(__file__).parent.parent
    if folder.resolve() != ours:
        for package in PACKAGES:
            if any((folder / name).exists() for name in (package, f"{package}.py")):
                raise ConfigError(
                    f"{folder / package} would hide grpo-ray's own package {package}: rename it, or submit from another folder"
                )
    left_out = (*LEFT_OUT, *exclude)
    for module in hiding(str(folder)):
        # The cluster's processes search the shipped folder first.
        if not _matches(Path(module).name, left_out):
            raise ConfigError(f"{hidden_by(module)}, leave it out with --exclude, or submit from another folder")
    files = [f for f in shipped(folder, left_out) if f.parts[0] not in PACKAGES]
    sizes = Counter[str]()
    for file in files:
        sizes[file.parts[0]] += (folder / file).stat().st_size
    if sizes.total() > limit_bytes:
        largest = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.most_common(LARGEST_NAMED))
        raise ConfigError(
            f"{folder} holds {sizes.total() / 1e6:,.0f} MB to ship, {limit_bytes / 1e6:,.0f} MB at most (largest: {largest}): "
            "leave things out with --exclude NAME, or put data where the cluster's nodes see them and name that path in the recipe"
        )
    for file in files:
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, into / file)
    for package in PACKAGES:
        for file in shipped(ours / package, LEFT_OUT):
            (into / package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ours / package / file, into / package / file)
    return sizes.total()


def shipped(folder: Path, left_out: Sequence[str]) -> Iterator[Path]:
    """The files below, relative; links to folders are not followed."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(
            d for d in folders if not _matches(d, left_out) and not Path(where, d, "pyvenv.cfg").is_file()
        )
        for name in sorted(files):
            path = Path(where, name)
            if not _matches(name, left_out) and path.is_file():
                yield path.relative_to(folder)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern.rstrip("/")) for pattern in patterns)
