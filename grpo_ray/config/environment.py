"""The schema of environments: their classes and tools, their workers, and the budgets of an episode."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, model_validator

from grpo_ray.config.base import (
    Env,
    HomePath,
    Labels,
    NonNegFloat,
    NonNegInt,
    PositiveFloat,
    PositiveInt,
    Resources,
    Strict,
    expand_home,
    file_and_function,
    is_in_file,
    is_users,
)

ENVIRONMENT_POOL = "environment"
"""The name of the workers in which environments live, and of their role in `grpo-ray scale`."""
COLUMN = "environment"
"""The column of a row that names its environment, where there are several."""

UserName = Annotated[str, AfterValidator(expand_home)]


class EnvironmentClassConfig(Strict):
    """One environment class of several."""

    name: UserName
    """The class: `package.module.Class`, or `file.py:Class`."""
    package: str | None = None
    """The installed package that holds it; see `reward.functions`."""
    args: dict[str, Any] = {}
    """The arguments of the class, or of the function that returns an instance."""
    interface: Literal["auto", "tools", "gym", "skyrl", "textarena"] = "auto"
    """How it is played. `tools`: TRL's, its public methods are tools. The others are text games, whose observations are the next
    user message: `step` of gym, `init` and `step` of skyrl-gym, `get_observation` and `step` of textarena. `auto`: by the
    methods that it has."""

    @property
    def title(self) -> str:
        """The name of its reward in metrics: that of the class."""
        if is_in_file(self.name):
            path, found = file_and_function(self.name)
            return re.sub(r"[^A-Za-z0-9_.-]", "_", found or PurePath(path).stem)
        return self.name.rpartition(".")[2]


class EnvironmentConfig(Strict):
    name: UserName | None = None
    """The environment class, `package.module.Class` or `file.py:Class`, with TRL's contract or as a text game."""
    package: str | None = None
    """The installed package that holds the class; see `reward.functions`."""
    args: dict[str, Any] = {}
    """The arguments of the class, or of the function that returns an instance."""
    interface: Literal["auto", "tools", "gym", "skyrl", "textarena"] = "auto"
    """How it is played; see `EnvironmentClassConfig`."""
    classes: dict[str, EnvironmentClassConfig] = {}
    """Several classes by name, in the place of `name`; a row's column `environment` says which is its own."""
    tools: tuple[UserName, ...] = ()
    """Functions that the model may call in every episode, besides its environment's own: `package.module.function` or
    `file.py:function`."""
    tool_parser: str | None = None
    """How calls are read in what the model writes: `hermes`, or the name of another of vLLM's tool parsers. None: hermes."""
    template: HomePath | None = None
    """A file with the chat template of episodes, one that writes every turn as it was. None: the model's own, with the known small
    change where it takes reasoning out of earlier turns."""

    max_turns: PositiveInt | None = None
    """The number of the model's turns after which an episode ends. None: as many as rollout.max_completion_length holds."""
    max_tool_calls: NonNegInt | None = None
    """The number of tool calls of an episode; the turn that would exceed it is the last, and is not answered. None: any."""
    max_turn_tokens: PositiveInt | None = None
    """The number of tokens that the model may write in one turn; a turn that is cut ends its episode. None: what is left."""
    max_result_chars: PositiveInt | None = None
    """The number of characters of one text of the environment; a longer one is cut, and says so. None: any."""

    reset_timeout_s: PositiveFloat = 60.0
    """The deadline for `reset`, and for making the instance."""
    step_timeout_s: PositiveFloat = 30.0
    """The deadline for one tool call, one step, and the rewards at the end."""
    episode_timeout_s: PositiveFloat = 600.0
    """The deadline for a whole episode, sampling included."""

    num_actors: PositiveInt = 1
    num_cpus: NonNegFloat = 1
    resources: Resources = {}
    labels: Labels = {}
    num_envs: PositiveInt = 16
    """The number of episodes that one worker holds at once; others wait."""
    envs_per_process: PositiveInt = 1
    """The number of instances in one process, where one runs at a time. 1: each has a process of its own, and neither blocks
    nor can hurt another; light ones are cheaper together."""
    memory_gb: PositiveFloat = 4.0
    """The memory limit of a process, which gets a MemoryError beyond it."""
    env: Env = {}

    def with_names(self, placed: Callable[[str], str]) -> Self:
        """The section with the name of every class and tool replaced by what `placed` gives for it."""
        classes = {k: c.model_copy(update={"name": placed(c.name)}) for k, c in self.classes.items()}
        name = None if self.name is None else placed(self.name)
        return self.model_copy(update={"name": name, "classes": classes, "tools": tuple(map(placed, self.tools))})

    @property
    def by_name(self) -> dict[str, EnvironmentClassConfig]:
        """Every environment class by the name that rows know it by; a single one has the name ''."""
        if self.name is None:
            return self.classes
        one = EnvironmentClassConfig(name=self.name, package=self.package, args=self.args, interface=self.interface)
        return {"": one}

    @property
    def titles(self) -> list[str]:
        """The names of the rewards that environments may give."""
        return list(dict.fromkeys(c.title for c in self.by_name.values()))

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.name is not None and self.classes:
            raise ValueError("environment has both name and classes: put the one class among the others, under a name")
        if self.name is None and not self.classes and not self.tools:
            raise ValueError("environment names no class and no tools: give name, classes or tools, or take it out")
        alone = {"args": self.args, "package": self.package, "interface": self.interface != "auto"}
        if self.name is None and (useless := next((k for k, v in alone.items() if v), None)):
            raise ValueError(f"environment.{useless} belongs to environment.name, and there is none")
        names = [*(c.name for c in self.by_name.values()), *self.tools]
        if (built_in := next((n for n in names if not is_users(n)), None)) is not None:
            raise ValueError(
                f"environment names {built_in!r}, and none is built in; name it package.module.NAME or file.py:NAME"
            )
        return self

    @model_validator(mode="after")
    def _inner_deadlines_first(self) -> Self:
        for name in ("reset_timeout_s", "step_timeout_s"):
            if getattr(self, name) > self.episode_timeout_s:
                raise ValueError(
                    f"environment.{name} ({getattr(self, name):g}) is above environment.episode_timeout_s "
                    f"({self.episode_timeout_s:g}), which would end first; raise the second"
                )
        return self
