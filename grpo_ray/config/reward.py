"""The schema of rewards: the functions, their workers, and the treatment of failures."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from grpo_ray.config.base import (
    Env,
    Labels,
    NonNegFloat,
    NonNegInt,
    PositiveFloat,
    PositiveInt,
    Resources,
    Strict,
    check_bounds,
    expand_home,
    file_and_function,
    is_in_file,
    is_users,
)

SHARED_POOL = "reward"
"""The name of the reward workers shared by all functions that have none of their own."""


class RewardWorkersConfig(Strict):
    """Reward workers that serve a single reward function, and call it with all samples in their queue (64 at most)."""

    num_actors: PositiveInt = 1
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat = 0
    """The number of GPUs per reward worker."""
    timeout_s: PositiveFloat | None = None
    """The deadline for one sample. None: reward.timeout_s."""


def _at_home(args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """The arguments with `~` expanded in the paths of built-in rewards."""
    return {k: expand_home(v, info) if k in ("path", "cache") and isinstance(v, str) else v for k, v in args.items()}


class RewardFunctionConfig(Strict):
    name: Annotated[str, AfterValidator(expand_home)]
    """A built-in (`grpo-ray check` lists them), or a function by dotted path, `package.module.function`, or by its file,
    `rewards.py:function` (absolute, or relative to the recipe or the current folder)."""
    package: str | None = None
    """The installed package that holds the function `name`, e.g. trl: only functions of the working folder, of files and of
    packages named here are called; none of Python's own modules, of grpo-ray's or of its dependencies."""
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """The function's name in metrics and `eval.accuracy`, if it is listed more than once. None: `name`."""
    weight: float = 1.0
    args: Annotated[dict[str, Any], AfterValidator(_at_home)] = {}
    """Keyword arguments that every call gets besides the data."""
    sources: tuple[str, ...] = ()
    """The values of column `source` to which the function applies; empty: all rows. To other rows it contributes nothing."""
    from_step: NonNegInt = 0
    """The number of completed steps from which the function applies, counted when a prompt is dispatched: DeepSeek-R1 uses
    preference rewards in the last 400 of 1,700 steps (from_step 1300), because they get hacked eventually. Evaluations always
    apply it."""
    part: Literal["all", "reasoning", "summary"] = "all"
    """The part of a completion that the function sees: `summary` is what follows `</think>`. R1 judges helpfulness by the summary
    alone, and harmlessness by all."""

    workers: RewardWorkersConfig | None = None
    """Reward workers of its own: for a model (`reward_model`, `judge`), which is slow to load and faster in batches."""

    @property
    def title(self) -> str:
        if self.label or not self.in_file:
            return self.label or self.name
        path, function = file_and_function(self.name)
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{PurePath(path).stem}.{function}".rstrip("."))

    @property
    def in_file(self) -> bool:
        """Is it named by the file that it is in?"""
        return is_in_file(self.name)

    @property
    def built_in(self) -> bool:
        return not is_users(self.name)

    @property
    def needs_host(self) -> bool:
        """Whether it runs with the network and HOME, as the user's own do, and those that query a server or load a model."""
        return not self.built_in or self.name in ("judge", "reward_model")


CODE_TIMEOUT_S = 8.0
"""The default `timeout_s` of the reward `code`, for all tests of one program."""
KEY_VARIABLE = "OPENAI_API_KEY"
JUDGE_DEADLINE_S = 60.0
"""The default `deadline_s` of the reward `judge`, for one question, retries included."""


class FailurePolicy(Strict):
    """The treatment of a sample whose reward function timed out, crashed or raised."""

    action: Literal["drop_group", "drop_sample", "value"] = "drop_group"
    """`drop_group`: another prompt takes the place of its group. `drop_sample`: it has no part in mean, standard deviation
    and loss of its group, and the others are trained; a group without any score is dropped. `value`: its reward is `value`."""
    value: float = 0.0
    """The reward of such a sample under `action: value`."""
    retries: NonNegInt = 1
    """The number of retries before the action."""
    abort_above: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The fraction of a step's samples that may fail before the run ends."""


class RewardConfig(Strict):
    functions: tuple[RewardFunctionConfig, ...] = ()
    num_actors: PositiveInt = 1
    min_actors: PositiveInt | None = None
    max_actors: PositiveInt | None = None
    """The upper bound of scaling, as for rollout.max_actors."""
    num_cpus: NonNegFloat = 1
    resources: Resources = {}
    labels: Labels = {}
    timeout_s: PositiveFloat = 10.0
    """The deadline for one function on one sample; a call with a group of G gets G times as long."""
    num_gpus: NonNegFloat = 0
    """The number of GPUs per reward worker."""
    unit: Literal["auto", "sample", "group", "batch"] = "auto"
    """The samples of one call. `auto`: one sample for built-ins and verl's functions, a whole group for all others, as in TRL; if
    one is not built in, all wait until the group is complete. `sample`: one, as soon as it is sampled. `group`: the whole group.
    `batch`: all samples in a worker's queue. If a call fails, all of its samples fail."""
    memory_gb: PositiveFloat = 4.0
    """The memory limit of a scoring process, which gets a MemoryError beyond it."""
    on_failure: FailurePolicy = FailurePolicy()
    env: Env = {}

    @property
    def whole_groups(self) -> bool:
        """Whether the samples of a group go to the functions together, once all are sampled."""
        return self.unit == "group" or (self.unit == "auto" and not all(f.built_in for f in self.functions))

    @property
    def pools(self) -> dict[str, RewardConfig]:
        """Pool name -> its config: one for each function with reward workers of its own, and SHARED_POOL for all others."""
        shared = tuple(f for f in self.functions if f.workers is None)
        out = {SHARED_POOL: self.model_copy(update={"functions": shared})} if shared else {}
        for function in self.functions:
            if (workers := function.workers) is not None:
                alone = {"functions": (function,), "unit": "batch", **workers.model_dump(exclude_none=True)}
                out[f"reward-{function.title}"] = self.model_copy(update=alone)
        return out

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        check_bounds("reward", self.num_actors, self.min_actors, self.max_actors)
        return self

    @model_validator(mode="after")
    def _inner_deadlines_first(self) -> Self:
        for function in self.functions:
            limit_s = function.args.get("timeout_s", CODE_TIMEOUT_S)
            if function.name == "code" and limit_s >= self.timeout_s:
                raise ValueError(
                    f"reward 'code' gives a program {limit_s:g} s (args.timeout_s), and reward.timeout_s is {self.timeout_s:g}: a "
                    "program that loops would be a failure of the scorer instead of a wrong answer; keep the second above the first"
                )
            own = function.workers.timeout_s if function.workers else None
            deadline_s = function.args.get("deadline_s", JUDGE_DEADLINE_S)
            if function.name == "judge" and deadline_s >= (own or self.timeout_s):
                raise ValueError(
                    f"reward 'judge' waits {deadline_s:g} s for an answer (args.deadline_s), and its process is killed after "
                    f"{own or self.timeout_s:g}; give it workers: {{timeout_s: {2 * deadline_s:g}}}"
                )
        return self
