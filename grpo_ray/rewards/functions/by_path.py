"""A recipe's own reward functions, by dotted path `package.module.function`, or by file, `rewards.py:mine`, as in verl's
`custom_reward_function`."""

from __future__ import annotations

from grpo_ray.config.base import file_and_function
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.user_code.functions import UserFunction, of_module, of_path
from grpo_ray.user_code.places import ForeignCodeError


def users_function(config: RewardFunctionConfig) -> UserFunction:
    """The function that a recipe names, not imported. Like a script, its file can import the modules beside it.

    Raises:
        RewardError: there is no such file or function, or a recipe may not name it.
    """
    try:
        if not config.in_file:
            return of_module(config.name, config.package)
        return of_path(*file_and_function(config.name))
    except ForeignCodeError as e:
        raise RewardError(f"reward {config.name!r}: {e}") from None
