"""What `check` says of environments: what they are, which tools the model sees, and whether the chat template keeps its turns."""

from __future__ import annotations

from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.episodes.described import Described, load_all, users_code
from grpo_ray.episodes.templates import episode_template


def environment_rows(config: RunConfig, tokenizer: Any, *, imports: bool) -> list[tuple[str, str]]:
    """The plan's lines on environments.

    Args:
        imports: False: none of the recipe's own code is run.

    Raises:
        RewardError: a class or a tool can't be used.
        ConfigError: the chat template does not keep the turns of an episode.
    """
    environment = config.environment
    if environment is None:
        return []
    if not imports and any(function.foreign for _, function in users_code(environment)):
        return [("environment", "nothing is said of it, for its code is not run")]
    found = {name: loaded.described() for name, loaded in load_all(environment).items()}
    rows = [("environment", _told(name, one)) for name, one in found.items()]
    kwargs = {**config.data.chat_template_kwargs, **_chosen(config)}
    templates = {
        episode_template(
            getattr(tokenizer, "whole", tokenizer),
            environment.template,
            list(one.schemas) or None,
            kwargs,
            roles=("user",) if one.is_game else ("tool",),
        ).told
        for one in found.values()
        if one.is_game or one.schemas
    }
    held = environment.num_actors * environment.num_envs
    at_once = min(config.samples_under_way, held)
    waits = "" if held >= config.samples_under_way else f" of {config.samples_under_way}; the others wait"
    return [*rows, *(("turns", told) for told in templates), ("", f"{at_once} episodes at once{waits}")]


def _told(name: str, found: Described) -> str:
    tools = ", ".join(schema["function"]["name"] for schema in found.schemas)
    what = f"a text game ({found.interface})" if found.is_game else f"tools {tools or 'none'}"
    reward = "a reward of its own" if found.rewards else "no reward of its own"
    return f"{f'{name}: ' if name else ''}{found.title or 'tools alone'}, {what}, {reward}"


def _chosen(config: RunConfig) -> dict[str, str]:
    name = config.data.template.partition(":")[2]
    return {"chat_template": name} if name else {}
