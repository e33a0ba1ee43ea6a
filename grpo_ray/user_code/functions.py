"""The functions that a recipe names: first found in their source, imported only to be called."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.errors import kind_and_line
from grpo_ray.user_code.files import FILE_MODULE, file_module
from grpo_ray.user_code.modules import name_taken
from grpo_ray.user_code.places import FORMER, OFFERED, ForeignCodeError, check_file, locate
from grpo_ray.user_code.source import Found, Source, defined, find


@dataclass(frozen=True)
class UserFunction:
    """A function that a recipe names, not imported."""

    source: Source
    name: str
    found: Found

    @property
    def foreign(self) -> bool:
        """Whether it is not grpo-ray's own."""
        return self.source.module not in OFFERED

    def __str__(self) -> str:
        return f"{self.name} of {self.source.file}"

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ForeignCodeError: its module can't be imported, or the result is no function that a recipe may name.
        """
        module = _imported(self.source)
        try:
            value = getattr(module, self.name)
        except AttributeError:
            raise ForeignCodeError(f"{self.source} has no {self.name!r} when it is imported") from None
        if not callable(value):
            raise ForeignCodeError(f"{self.name!r} is a {type(value).__name__}, expected a function")
        if self.found.node is None:
            _check_home(value, self.source)
        function: Callable[..., Any] = value
        return function


def of_module(dotted: str, package: str | None) -> UserFunction:
    """The function `package.module.function`.

    Args:
        package: the installed package that the recipe names.

    Raises:
        ForeignCodeError: it does not exist, or a recipe may not name it.
    """
    module, _, name = dotted.rpartition(".")
    module = FORMER.get(module, module)
    return _user_function(Source(locate(module, package), module, package), name)


def of_path(path: str, name: str) -> UserFunction:
    """A function of a file, `~` being the home. Raises ForeignCodeError as `of_module` does, and where there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ForeignCodeError(_no_file(file))
    return of_file(file, name)


def _no_file(file: Path) -> str:
    if file.is_dir():
        return f"{file} is a folder"
    if not file.is_absolute():
        return f"there is no file {file} in {Path.cwd()}"
    return (
        f"there is no file {file} on {socket.gethostname()}; every node has to see it: put it on a file system that all of them "
        "mount, or use `grpo-ray submit` from its folder, which ships it"
    )


def of_file(file: Path, name: str) -> UserFunction:
    """A function of a file. Raises ForeignCodeError as `of_module` does."""
    check_file(file)
    source = Source(file.resolve(), None, None)
    if not name:
        names = _read(source, lambda: defined(source.file))
        raise ForeignCodeError(
            f"name the function in the file, {file}:{(names or ['NAME'])[0]}; it has {', '.join(names) or 'no functions'}"
        )
    return _user_function(source, name)


def _user_function(source: Source, name: str) -> UserFunction:
    return UserFunction(source, name, _read(source, lambda: find(source, name)))


def _read(source: Source, reading: Callable[[], Any]) -> Any:
    try:
        return reading()
    except SyntaxError as e:
        raise _no_import(source, e) from None
    except OSError as e:
        raise ForeignCodeError(f"{source.file} can't be read ({e.strerror})") from None


def _imported(source: Source) -> Any:
    if str(source.file.parent) not in sys.path and source.module is None:
        sys.path.append(str(source.file.parent))
    try:
        module = file_module(source.file) if source.module is None else importlib.import_module(source.module)
    except (Exception, SystemExit) as e:
        raise _no_import(source, e) from e
    file = getattr(module, "__file__", None)
    if file is None or os.path.realpath(file) != os.path.realpath(source.file):
        raise ForeignCodeError(f"{source} is {file or 'built in'} when it is imported, and not {source.file}")
    return module


def _no_import(source: Source, error: BaseException) -> ForeignCodeError:
    lacking = error.name if isinstance(error, ImportError) else None
    taken = None if lacking is None else name_taken(lacking)
    if isinstance(error, ModuleNotFoundError) and lacking is not None:
        if taken is not None:
            return ForeignCodeError(f"there is no module {lacking!r}: {taken}")
        return ForeignCodeError(f"its {source} imports {lacking!r}, which is not installed ({error})")
    where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
    what = str(source.file) if source.module is None else repr(source.module)
    return ForeignCodeError(
        f"importing {what}{where} failed with {kind_and_line(error)}" + (f"; {taken}" if taken else "")
    )


def _check_home(value: Any, source: Source) -> None:
    """Raises ForeignCodeError for a function of a module that a recipe may not name, whatever its name in the user's module."""
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    made_by_a_call = "<locals>" in getattr(value, "__qualname__", "")
    if made_by_a_call or not (inspect.isroutine(value) or isinstance(value, type)):
        return
    home = getattr(value, "__module__", None) or "builtins"
    if home == source.module or home.startswith(FILE_MODULE):
        return
    try:
        locate(home, source.package)
    except ForeignCodeError as e:
        raise ForeignCodeError(f"what it is called in {source} is {home}.{value.__name__}, and {e}") from None
