"""What `submit` ships: the user's folder and this grpo-ray, copied side by side into one folder that Ray uploads.

The cluster's image has the dependencies. Our own packages are shipped too, so that both sides run the same version.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from actors.search_path import PACKAGES, hidden_by, hiding
from grpo_ray.errors import ConfigError
from launch.cluster.shipped import LEFT_OUT, Shipped, choose, matches, shipped

LIMIT_BYTES = 200 << 20
"""The limit of the upload: Ray keeps it in the memory of the head node, and refuses above half a GB."""
LARGEST_NAMED = 3
LISTED = 40
"""The number of files that are listed by name."""


def stage(
    folder: Path,
    into: Path,
    exclude: Sequence[str] = (),
    limit_bytes: int = LIMIT_BYTES,
    *,
    named: Iterable[Path] = (),
    include: Sequence[str] = (),
) -> Shipped:
    """Fill `into`; returns what it has of the user's. For `named`, `include` and `exclude` see `choose`.

    Raises:
        ConfigError: the folder is too large, or holds something that would hide grpo-ray, or that must not be uploaded.
    """
    ours = Path(__file__).parents[2]
    if folder.resolve() != ours:
        for package in PACKAGES:
            if any((folder / name).exists() for name in (package, f"{package}.py")):
                raise ConfigError(
                    f"{folder / package} would hide grpo-ray's own package {package}: rename it, or submit from another folder"
                )
    for module in hiding(str(folder)):
        # The cluster's processes search the shipped folder first.
        if not matches(Path(Path(module).name), (*LEFT_OUT, *exclude)):
            raise ConfigError(f"{hidden_by(module)}, leave it out with --exclude, or submit from another folder")
    found = choose(folder, named, include, (*exclude, *(PACKAGES if folder.resolve() == ours else ())))
    sizes = Counter[str]()
    for file, size in found.files.items():
        sizes[file.parts[0]] += size
    if found.size > limit_bytes:
        largest = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.most_common(LARGEST_NAMED))
        raise ConfigError(
            f"{folder} holds {found.size / 1e6:,.0f} MB to ship, {limit_bytes / 1e6:,.0f} MB at most (largest: {largest}): "
            "leave things out with --exclude NAME, or put data where the cluster's nodes see them and name that path in the recipe"
        )
    for file in found.files:
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, into / file)
    for package in PACKAGES:
        for file in shipped(ours / package, LEFT_OUT):
            (into / package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ours / package / file, into / package / file)
    return found


def told(found: Shipped) -> Iterator[str]:
    """The report of what is uploaded, the largest first, and what is not."""
    by_size = sorted(found.files.items(), key=lambda entry: (-entry[1], entry[0]))
    for file, size in by_size[:LISTED]:
        yield f"upload   {size / 1e3:>10,.1f} kB  {file}"
    if rest := by_size[LISTED:]:
        yield f"upload   {sum(size for _, size in rest) / 1e3:>10,.1f} kB  in {len(rest):,} smaller files"
    for file, why in sorted(found.left_out.items())[:LISTED]:
        yield f"left out {file}: {why}"
    if len(found.left_out) > LISTED:
        yield f"left out {len(found.left_out) - LISTED:,} more files"
