"""The environment classes and tools that a recipe names: found, checked, loaded, and described for the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_ray.config.base import file_and_function, is_in_file
from grpo_ray.config.environment import EnvironmentClassConfig, EnvironmentConfig
from grpo_ray.episodes.contract import REWARD, BrokenContractError, Interface, interface_of, tool_names
from grpo_ray.episodes.instances import Instance, Tools, instance_of
from grpo_ray.user_code.functions import UserFunction, of_module, of_path
from grpo_ray.user_code.places import ForeignCodeError

Schema = dict[str, Any]


@dataclass(frozen=True)
class Described:
    """What the sampler has to know of one environment."""

    title: str
    """The name of its reward: that of the class."""
    interface: Interface
    schemas: tuple[Schema, ...]
    """The JSON schemas of its tools, as chat templates take them."""
    rewards: bool
    """Whether its class gives a reward of its own."""

    @property
    def is_game(self) -> bool:
        """Whether its observations are user messages, and what the model writes is an action as a whole."""
        return self.interface != "tools"


class LoadedClass:
    """An environment class, imported."""

    def __init__(self, config: EnvironmentClassConfig | None, tools: Tools) -> None:
        """`config` None: tools alone."""
        self._config = config
        self._tools = tools
        self._make: Callable[..., Any] = _load(config.name, config.package, "environment") if config else _nothing
        self.interface: Interface = "tools"
        if config is not None:
            # A function that returns an instance (TRL's factory) shows only then what it makes.
            shown = self._make if isinstance(self._make, type) else type(self._made())
            self.interface = interface_of(shown, config.interface, config.name)
            self._shown = shown
            if tools and self.interface != "tools":
                raise BrokenContractError(
                    f"environment {config.name!r} is a text game ({self.interface}), where all that the model writes is its move: "
                    "take environment.tools out, or give it interface: tools"
                )

    def instance(self) -> Instance:
        """A new instance."""
        if self._config is None:
            from grpo_ray.episodes.instances import ToolInstance

            return ToolInstance(None, self._tools)
        return instance_of(self.interface, self._make, self._config.args, self._tools)

    def described(self) -> Described:
        """The description of the class; imports Transformers where there are tools.

        Raises:
            BrokenContractError: a tool has no type hints or no description.
        """
        own = {name: getattr(self._shown, name) for name in tool_names(self._shown)} if self._has_own_tools else {}
        bound = {name: function.__get__(object()) for name, function in own.items()}
        schemas = tuple(_schema(name, function) for name, function in {**self._tools, **bound}.items())
        title = self._config.title if self._config else ""
        rewards = self._config is not None and (self.interface != "tools" or hasattr(self._shown, REWARD))
        return Described(title, self.interface, schemas, rewards)

    @property
    def _has_own_tools(self) -> bool:
        return self._config is not None and self.interface == "tools"

    def _made(self) -> Any:
        assert self._config is not None
        return self._make(**self._config.args)


def load_all(config: EnvironmentConfig) -> dict[str, LoadedClass]:
    """Every environment by the name that rows know it by; '' where there is one, or tools alone.

    Raises:
        BrokenContractError: naming the class or tool that can't be imported, or lacks what it needs.
    """
    tools = {_plain_name(name): _load(name, None, "tool") for name in config.tools}
    if not config.by_name:
        return {"": LoadedClass(None, tools)}
    return {name: LoadedClass(one, tools) for name, one in config.by_name.items()}


def users_code(config: EnvironmentConfig) -> list[tuple[str, UserFunction]]:
    """Every class and tool that the recipe names, not imported, with the option that names it.

    Raises:
        BrokenContractError: there is no such file or name, or a recipe may not name it.
    """
    classes = [("environment", c.name, c.package) for c in config.by_name.values()]
    tools = [("environment.tools", name, None) for name in config.tools]
    return [(f"{option} {name}", _found(name, package, option)) for option, name, package in [*classes, *tools]]


def _load(name: str, package: str | None, what: str) -> Callable[..., Any]:
    try:
        return _found(name, package, what).load()
    except ForeignCodeError as e:
        raise BrokenContractError(f"{what} {name!r}: {e}") from e


def _found(name: str, package: str | None, what: str) -> UserFunction:
    try:
        return of_path(*file_and_function(name)) if is_in_file(name) else of_module(name, package)
    except ForeignCodeError as e:
        raise BrokenContractError(f"{what} {name!r}: {e}") from None


def _plain_name(name: str) -> str:
    return file_and_function(name)[1] if is_in_file(name) else name.rpartition(".")[2]


def _schema(name: str, function: Callable[..., Any]) -> Schema:
    from transformers.utils import get_json_schema

    try:
        found: Schema = get_json_schema(function)
    # It raises errors of several kinds, and whatever a broken annotation raises.
    except Exception as e:
        raise BrokenContractError(
            f"tool {name!r} can't be described to the model ({e}); give each parameter a type hint and a line under `Args:` in the "
            "docstring, or begin the name with _ if it is no tool"
        ) from None
    return found


def _nothing() -> None:
    """Stand in for the class of a recipe that has tools alone."""
