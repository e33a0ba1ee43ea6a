"""The schema of rewards: which functions, in which workers, and what becomes of those that fail."""

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
)

SHARED_POOL = "reward"
"""The reward workers of all functions that have none of their own."""


class RewardWorkersConfig(Strict):
    """Workers that have one reward function alone, and call it with all samples that they have at hand (64 at most)."""

    num_actors: PositiveInt = 1
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat = 0
    """Per actor."""
    timeout_s: PositiveFloat | None = None
    """For one sample. None: reward.timeout_s."""


def _at_home(args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """With the home in place of `~` in what is a path of built-in rewards."""
    return {k: expand_home(v, info) if k in ("path", "cache") and isinstance(v, str) else v for k, v in args.items()}


_IN_FILE = re.compile(r"(?P<file>.*\.py)(:(?P<function>.*))?", re.DOTALL)


def file_and_function(name: str) -> tuple[str, str]:
    """Of `file.py:function`; the function is '' where it is not named. Raises ValueError for a name of another kind."""
    found = _IN_FILE.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} names no file")
    return found["file"], found["function"] or ""


class RewardFunctionConfig(Strict):
    name: Annotated[str, AfterValidator(expand_home)]
    """A built-in (`grpo-ray check` lists them), a function by dotted path, `package.module.function`, or by its file,
    `rewards.py:function` (absolute, or relative to the recipe or the current folder)."""
    package: str | None = None
    """The installed package whose function `name` is, e.g. trl: only functions of the working folder, of files and of packages that
    are named so are called; none of Python's own modules, of grpo-ray's or of the libraries that it is made of."""
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """What metrics and `eval.accuracy` call it, where a function stands in the list more than once. None: its name."""
    weight: float = 1.0
    args: Annotated[dict[str, Any], AfterValidator(_at_home)] = {}
    """Keyword arguments that every call gets besides the data."""
    sources: tuple[str, ...] = ()
    """Only rows whose column `source` is one of these; empty: all rows. Where it does not apply, it adds nothing."""
    from_step: NonNegInt = 0
    """Only prompts that are dispatched after so many steps: DeepSeek-R1 gives preference rewards in the last 400 of 1,700
    (from_step 1300), for they are hacked in the end. Evaluations always have it."""
    part: Literal["all", "reasoning", "summary"] = "all"
    """What it sees of a completion: `summary` is what follows `</think>`. R1 judges helpfulness by the summary alone, and
    harmlessness by all."""

    workers: RewardWorkersConfig | None = None
    """Workers of its own: for a model (`reward_model`, `judge`), which is slow to load and quicker in batches."""

    @property
    def title(self) -> str:
        if self.label or not self.in_file:
            return self.label or self.name
        path, function = file_and_function(self.name)
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{PurePath(path).stem}.{function}".rstrip("."))

    @property
    def in_file(self) -> bool:
        """Is it named by the file that it is in?"""
        return _IN_FILE.fullmatch(self.name) is not None

    @property
    def built_in(self) -> bool:
        return "." not in self.name

    @property
    def needs_host(self) -> bool:
        """Does it run with the network and HOME? The user's own do, and what asks a server or loads a model."""
        return not self.built_in or self.name in ("judge", "reward_model")


CODE_TIMEOUT_S = 8.0
"""`timeout_s` of the reward `code`: for all tests of one program."""
KEY_VARIABLE = "OPENAI_API_KEY"
JUDGE_DEADLINE_S = 60.0
"""`deadline_s` of the reward `judge`: for one question, retries included."""


class FailurePolicy(Strict):
    """What becomes of a sample whose reward function timed out, crashed or raised."""

    action: Literal["drop_group", "value"] = "drop_group"
    value: float = 0.0
    """The reward it gets under `action: value`."""
    retries: NonNegInt = 1
    """Tries more before the action."""
    abort_above: Annotated[float, Field(ge=0, le=1)] = 0.5
    """End the run when more than this part of a step's samples failed."""


class RewardConfig(Strict):
    functions: tuple[RewardFunctionConfig, ...] = ()
    num_actors: PositiveInt = 1
    min_actors: PositiveInt | None = None
    max_actors: PositiveInt | None = None
    """As rollout.max_actors."""
    num_cpus: NonNegFloat = 1
    resources: Resources = {}
    labels: Labels = {}
    timeout_s: PositiveFloat = 10.0
    """For one function on one sample; a call with a group of G gets G times as long."""
    num_gpus: NonNegFloat = 0
    """Per actor."""
    unit: Literal["auto", "sample", "group", "batch"] = "auto"
    """What functions are called with. `auto`: built-ins and verl's with one sample, all others with a whole group, as by TRL; if
    one is not built in, all wait until the group is complete. `sample`: one, the moment it is drawn. `group`: the whole group.
    `batch`: all samples that a worker has at hand. A call that fails fails all of its samples."""
    memory_gb: PositiveFloat = 4.0
    """A scoring process that takes more gets a MemoryError."""
    on_failure: FailurePolicy = FailurePolicy()
    env: Env = {}

    @property
    def whole_groups(self) -> bool:
        """Do the samples of a group go to the functions together, when all are drawn?"""
        return self.unit == "group" or (self.unit == "auto" and not all(f.built_in for f in self.functions))

    @property
    def pools(self) -> dict[str, RewardConfig]:
        """Name of a pool of workers -> its part: of the functions that have their own, and of all others (SHARED_POOL)."""
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
