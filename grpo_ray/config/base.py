"""The base class and the shared types of every section of the schema."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from grpo_ray.labels import check_labels, check_resources
from grpo_ray.secrets import check_env

PositiveInt = Annotated[int, Field(ge=1)]
NonNegInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegFloat = Annotated[float, Field(ge=0)]


def expand_home(path: str, info: ValidationInfo) -> str:
    """The path with `~` expanded, unless the config is for another machine (`build`)."""
    if not path.startswith("~") or (info.context or {}).get("keep_home"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {path.split('/')[0][1:]!r}; a folder of this name is ./{path}")
    return expanded


HomePath = Annotated[str, AfterValidator(expand_home)]
"""A path, or a URL or name in its place; `~` is expanded."""

Env = Annotated[dict[str, str], AfterValidator(check_env)]
"""Environment variables of workers. A secret is referenced, not written: `HF_TOKEN: ${HF_TOKEN}`."""

Resources = Annotated[dict[str, PositiveFloat], AfterValidator(check_resources)]
"""Custom resources of the cluster's nodes (`ray start --resources`), and how much of each an actor takes."""
Labels = Annotated[dict[str, str], AfterValidator(check_labels)]
"""The labels that an actor requires of its node (`ray start --labels`): `{zone: a}`, `{ray.io/accelerator-type: H100}`,
`{ray.io/node-id: ..}`. See `grpo_ray.labels`."""


class Strict(BaseModel):
    """Base of all sections: unknown keys are refused, and nothing changes after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def check_bounds(section: str, number: int, low: int | None, high: int | None) -> None:
    if low is None and high is None:
        return
    if low is None or high is None:
        raise ValueError(f"give both of {section}.min_actors and {section}.max_actors, or none")
    if not low <= number <= high:
        raise ValueError(
            f"{section}.num_actors is {number}, outside of {section}.min_actors and {section}.max_actors, {low} to {high}"
        )


SAMPLER_MIN_TEMPERATURE = 0.01


def check_temperature(section: str, temperature: float) -> None:
    if 0 < temperature < SAMPLER_MIN_TEMPERATURE:
        raise ValueError(
            f"{section}.temperature {temperature:g} is below {SAMPLER_MIN_TEMPERATURE}, which vLLM would sample at in its place; "
            "use that or more" + (", or 0 for the likeliest tokens" if section != "rollout" else "")
        )


HOW_TO_NAME = "A function of yours is named package.module.function or file.py:function"
_IN_FILE = re.compile(r"(?P<file>.*\.py)(:(?P<function>.*))?", re.DOTALL)


def is_users(name: str) -> bool:
    """Is this the name of a function of the recipe's own, and not of a built-in?"""
    return "." in name


def is_in_file(name: str) -> bool:
    """Is the function named by the file that it is in?"""
    return _IN_FILE.fullmatch(name) is not None


def file_and_function(name: str) -> tuple[str, str]:
    """Of `file.py:function`; the function is '' where it is not named. Raises ValueError for a name of another kind."""
    found = _IN_FILE.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} names no file")
    return found["file"], found["function"] or ""


def in_other_place(name: str, file: str) -> str:
    """The name of the same function, with its file in another place."""
    function = file_and_function(name)[1]
    return f"{file}:{function}" if function else file
