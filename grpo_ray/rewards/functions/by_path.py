"""A recipe's own reward functions, by dotted path `package.module.function`, or by file, `rewards.py:mine`, as in verl's
`custom_reward_function`."""

from __future__ import annotations

import socket
from pathlib import Path

from grpo_ray.config.reward import RewardFunctionConfig, file_and_function
from grpo_ray.errors import RewardError
from grpo_ray.user_code.functions import UserFunction, of_file, of_module
from grpo_ray.user_code.places import ForeignCodeError


def users_function(config: RewardFunctionConfig) -> UserFunction:
    """The function that a recipe names, not imported. Like a script, its file can import the modules beside it.

    Raises:
        RewardError: there is no such file or function, or a recipe may not name it.
    """
    try:
        if not config.in_file:
            return of_module(config.name, config.package)
        path, attribute = file_and_function(config.name)
        file = Path(path).expanduser()
        if not file.is_file():
            raise ForeignCodeError(_no_file(file))
        return of_file(file, attribute)
    except ForeignCodeError as e:
        raise RewardError(f"reward {config.name!r}: {e}") from None


def _no_file(file: Path) -> str:
    if file.is_dir():
        return f"{file} is a folder"
    if not file.is_absolute():
        return f"there is no file {file} in {Path.cwd()}"
    return (
        f"there is no file {file} on {socket.gethostname()}; every node has to see it: put it on a file system that all of them "
        "mount, or use `grpo-ray submit` from its folder, which ships it"
    )
