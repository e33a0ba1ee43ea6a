"""Reward functions by the file that they are in: `rewards.py:mine`, as in verl's `custom_reward_function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_ray.config_reward import file_and_function
from grpo_ray.errors import RewardError


def load_from_file(name: str) -> Callable[..., Any]:
    """The function that `file.py:function` names. Modules beside the file can be imported in it, as in a script's.

    Raises:
        RewardError: there is no such file or function, or the file can't be imported.
    """
    path, attribute = file_and_function(name)
    file = Path(path).expanduser()
    if not file.is_file():
        raise RewardError(f"reward {name!r}: {_no_file(file)}")
    module = _module(name, file.resolve())
    names = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    if not attribute:
        raise RewardError(
            f"reward {name!r}: name the function in the file, {path}:{(names or ['NAME'])[0]}; {_has(names)}"
        )
    found = getattr(module, attribute, None)
    if found is None:
        close = difflib.get_close_matches(attribute, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else _has(names)
        raise RewardError(f"reward {name!r}: {file} has no {attribute!r}; {hint}")
    if not callable(found):
        raise RewardError(f"reward {name!r} is a {type(found).__name__}, expected a function")
    function: Callable[..., Any] = found
    return function


def _has(names: Sequence[str]) -> str:
    return f"it has {', '.join(sorted(names)) or 'no functions'}"


def _no_file(file: Path) -> str:
    if file.is_dir():
        return f"{file} is a folder"
    if not file.is_absolute():
        return f"there is no file {file} in {Path.cwd()}"
    return (
        f"there is no file {file} on {socket.gethostname()}; every node has to see it: put it on a file system that all of them "
        "mount, or use `grpo-ray submit` from its folder, which ships it"
    )


def _module(name: str, file: Path) -> Any:
    known = f"reward_file_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if known in sys.modules:
        return sys.modules[known]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(known, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[known]
        first_line = (str(e).splitlines() or [""])[0]
        where = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise RewardError(
            f"reward {name!r}: importing {file}{where} failed with {type(e).__name__}: {first_line}"
        ) from e
    return module
