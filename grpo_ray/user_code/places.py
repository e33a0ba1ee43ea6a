"""Whose functions a recipe may name: those of the working folder, of a package that it names, of a file given by its path.

A recipe or a run's folder may be a stranger's, and `subprocess.check_output` with `args` would run their command. So a recipe may
never call Python's own modules, grpo-ray's or those of its dependencies.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from grpo_ray.user_code.modules import OURS, name_taken

TASKS = (
    "grpo_ray.tasks.arithmetic",
    "grpo_ray.tasks.calculator",
    "grpo_ray.tasks.guess_number",
    "grpo_ray.tasks.r1",
    "grpo_ray.tasks.word_problems",
)
OFFERED = (*TASKS, "grpo_ray.rewards.votes")
"""Our own modules whose functions recipes and evaluations may name."""
FORMER = {"grpo_ray.tiny_arithmetic": "grpo_ray.tasks.arithmetic", "grpo_ray.tiny_r1": "grpo_ray.tasks.r1"}
"""Former names in recipes and run folders -> the modules."""
TOOLS = frozenset(
    {"pip", "wheel", "uv", "pkg_resources", "pytest", "_pytest", "pluggy", "coverage", "mutmut", "IPython"}
)
"""Tools to install and to run other code, installed beside the libraries: a recipe may not name them either."""
ROOT = Path(__file__).parents[2]
MAX_RECORD = 8 << 20
_EXTRAS = ("cpu", "gpu", "wandb", "mlflow")
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_SYSTEM = (
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share", "/usr/bin", "/usr/sbin"),
    *("/lib", "/lib64", "/bin", "/etc"),
)
_code_folders: list[str] = []


class ForeignCodeError(Exception):
    """A function that a recipe may not name, or that does not exist; says why, and how to name it."""


class MissingCodeError(ForeignCodeError):
    """A module, or a name in it, that does not exist."""


def add_code_folder(folder: str) -> None:
    """Let modules of this folder count as the user's: the one that a run was started in."""
    if folder not in _code_folders:
        _code_folders.append(folder)


def search_here() -> None:
    """Put the current folder on the search path, after the libraries: a user's `random.py` must not replace Python's."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def locate(module: str, package: str | None) -> Path:
    """The file of a module whose functions a recipe may name. Nothing is imported.

    Args:
        module: its dotted name.
        package: the installed package that the recipe names.

    Raises:
        ForeignCodeError: it does not exist, or the recipe may not name it.
    """
    module = FORMER.get(module, module)
    top = module.partition(".")[0]
    if module in OFFERED:
        return ROOT / f"{module.replace('.', '/')}.py"
    if top in OURS:
        theirs = any((Path.cwd() / name).exists() for name in (top, f"{top}.py")) and Path.cwd() != ROOT
        raise (_taken(top) if theirs else None) or ForeignCodeError(
            f"{module} is grpo-ray's own; of its modules recipes name functions of {', '.join(TASKS)} alone"
        )
    if top in sys.stdlib_module_names or top in ("__main__", "builtins"):
        raise _taken(top) or ForeignCodeError(_never(module, "Python's own"))
    search_here()
    spec = _spec_of(module)
    file = Path(spec.origin) if spec.origin and spec.has_location else None
    if file is None:
        raise ForeignCodeError(f"{module} is a folder, or no module of Python; name a module in it")
    _check_owner(top, module, file, package)
    return file


def check_file(file: Path) -> None:
    """Raises ForeignCodeError for a file given by its path that belongs to Python, an installed package or us."""
    real = file.resolve()
    for path in (file.absolute(), real):
        if is_installed(path):
            raise ForeignCodeError(
                f"{path} is of an installed package or of Python; a function of a package is named package.module.function, with "
                "package: NAME"
            )
    if real.is_relative_to(ROOT.resolve()):
        inside = ".".join(real.relative_to(ROOT.resolve()).with_suffix("").parts)
        if inside.partition(".")[0] in OURS and FORMER.get(inside, inside) not in OFFERED:
            raise ForeignCodeError(
                f"{real} is grpo-ray's own; of its modules recipes name functions of {', '.join(TASKS)} alone"
            )


def is_installed(path: Path) -> bool:
    """Whether a path is in a folder of installed packages or of a Python."""
    return bool(_INSTALLED & set(path.parts)) or _is_systems(path) or _is_of_python(path) or _is_distributed(path)


def _is_systems(path: Path) -> bool:
    """Whether a path belongs to the operating system, whose packages install Python files too, and not to the user's folder."""
    return any(path.is_relative_to(folder) and not Path.cwd().is_relative_to(folder) for folder in _SYSTEM)


def _is_of_python(path: Path) -> bool:
    return any(map(_holds_python, path.parents))


@functools.cache
def _holds_python(folder: Path) -> bool:
    if (folder / "os.py").is_file() and (folder / "encodings").is_dir():
        return True
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return str(folder) in {*site.getsitepackages(), *places}


def _is_distributed(path: Path) -> bool:
    """Whether `pip install --target` put the path there. In the user's working folder, the records of an installation state which
    files are its own."""
    for folder in path.parents:
        users = any(Path(own).is_relative_to(folder) for own in (os.getcwd(), *_code_folders))
        for left in folder.glob("*.dist-info"):
            if not users or path.relative_to(folder).as_posix() in _recorded(left):
                return True
    return False


def _recorded(left: Path) -> set[str]:
    """The files of an installation, relative to its folder."""
    try:
        with (left / "RECORD").open(encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_RECORD).splitlines()
        return {row[0] for row in csv.reader(lines) if row}
    except (OSError, csv.Error):
        return set()


def _spec_of(module: str) -> ModuleSpec:
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        spec = None
    if spec is None:
        raise MissingCodeError(
            f"there is no module {top!r} in {os.getcwd()} or on PYTHONPATH; start the run from the folder that holds it, or "
            "install it"
        )
    name = top
    for part in below:
        name = f"{name}.{part}"
        inside = PathFinder.find_spec(name, list(spec.submodule_search_locations or ()))
        if inside is None:
            said = _taken(top)
            raise MissingCodeError(
                f"there is no module {name!r}: {said}"
                if said
                else f"there is no module {name!r} in {os.getcwd()} or on PYTHONPATH; functions are named package.module.function"
            )
        spec = inside
    return spec


def _check_owner(top: str, module: str, file: Path, package: str | None) -> None:
    depth = len(module.split(".")) - 1 + (file.name == "__init__.py")
    if _is_working(Path(os.path.abspath(file)).parents[depth], top) and not is_installed(file.resolve()):
        return
    if package != top:
        raise _taken(top) or ForeignCodeError(
            f"{module} is neither of the working folder nor of a package that the recipe names ({file}): a function of an "
            f"installed package is named with package: {top}"
        )
    if sysconfig.get_path("stdlib") in map(str, file.parents) and not _INSTALLED & set(file.parts):
        raise ForeignCodeError(_never(module, "Python's own"))
    if top in TOOLS or top in libraries() or top not in _owners():
        raise _taken(top) or ForeignCodeError(_never(module, "a library's that grpo-ray is made of"))


def _is_working(root: Path, top: str) -> bool:
    """Whether this folder on the search path is the user's."""
    if is_installed(root / top):
        return False
    own = (os.getcwd(), *sys.path[-1:], *_code_folders, *_python_path())
    if str(root) in map(os.path.abspath, own):
        return True
    # Put there by the calling program, or by an installation that points to a project's folder.
    return str(root) in map(os.path.abspath, sys.path) and top not in _owners()


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _taken(top: str) -> ForeignCodeError | None:
    said = name_taken(top)
    return None if said is None else ForeignCodeError(said)


def _never(module: str, whose: str) -> str:
    return (
        f"{module} is {whose}, and a recipe names functions of the working folder, of a package that it names (package: NAME) or "
        "of a file (file.py:function): write one of yours that calls it"
    )


@functools.cache
def libraries() -> frozenset[str]:
    """The import names of the packages that grpo-ray requires, and of those that they require. If the requirements are unknown, of
    all that are installed."""
    owners = _owners()
    try:
        needed = _needed("grpo-ray", _EXTRAS, set())
    except metadata.PackageNotFoundError:
        return frozenset(owners)
    return frozenset(name for name, dists in owners.items() if any(_normal(dist) in needed for dist in dists))


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """Import name -> the installed packages that provide it."""
    return metadata.packages_distributions()


def _needed(name: str, extras: tuple[str, ...], found: set[str]) -> set[str]:
    from packaging.requirements import Requirement

    for text in metadata.requires(name) or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        key = f"{_normal(wanted.name)}[{','.join(sorted(wanted.extras))}]"
        if key not in found:
            found |= {key, _normal(wanted.name)}
            try:
                _needed(wanted.name, tuple(wanted.extras), found)
            except metadata.PackageNotFoundError:
                continue
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
