"""The schema of a pipeline: `grpo-ray pipeline`.

    name: r1
    common: {train: {learner: {zero_stage: 3}}}          # under every stage of a kind; `all`: under every one of them
    eval: {data: {train: {path: held_out.jsonl}}, ..}    # sampled after each stage that makes a model
    stages:
      zero: {kind: train, config: {model: {path: base}, ..}}
      traces: {kind: sample, config: {model: {path: "${stages.zero.model}"}, ..}}

`${stages.NAME.OUTPUT}` is where a stage leaves something (kinds.py says what), and a stage needs all stages that it names so.
`${seed}` is the pipeline's.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from grpo_ray.config.base import HomePath, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.runtime import ClusterConfig

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class GateConfig(Strict):
    """What must be true of a stage before the next ones begin."""

    metric: str
    """A figure of the stage, by its name in the report: `accuracy`, `accuracy/add`, `length`, `reward/NAME`, `num_rows`."""
    at_least: float | None = None
    at_most: float | None = None
    not_below: str | None = None
    """Another stage: the metric must not be less than there.."""
    by: float = 0.0
    """.. by more than this."""

    @model_validator(mode="after")
    def _bound(self) -> Self:
        if self.at_least is None and self.at_most is None and self.not_below is None:
            raise ValueError(f"the gate on {self.metric} bounds nothing; give at_least, at_most or not_below")
        if self.by and self.not_below is None:
            raise ValueError(
                f"the gate on {self.metric}: by is how far it may be under another stage's: give not_below"
            )
        return self


class StageConfig(Strict):
    kind: str
    note: str = ""
    """One line for the plan and the report."""
    recipe: HomePath | None = None
    """A recipe that `config` goes over."""
    needs: tuple[StageName, ...] = ()
    """Stages to wait for besides those that `config` names."""
    config: dict[str, Any] = {}
    gate: tuple[GateConfig, ...] = ()
    eval: bool | dict[str, Any] = True
    """Measure the model that it makes by the pipeline's `eval`; a mapping goes over that, e.g. for another template."""


class AssumeConfig(Strict):
    """For `--dry-run`, where nothing of the kind has been measured yet."""

    completion_tokens: PositiveFloat | None = None
    """Of a sample. None: half of its limit."""
    prompt_tokens: PositiveFloat | None = None
    """None: half of its limit."""
    tokens_per_s: dict[str, PositiveFloat] = {}
    """Kind of stage -> tokens that it goes through in a second, start-up aside."""
    rows: dict[str, PositiveInt] = {}
    """Of data sets on the hub, by their path, and of what data stages make, by their name."""
    start_s: PositiveFloat = 60.0
    """Of a stage: engines and learners."""


class PipelineConfig(Strict):
    name: str | None = None
    """Folder under `dir`. None: the recipe's name. Running it again goes on."""
    dir: HomePath = "runs"
    seed: int = 1
    cluster: ClusterConfig = ClusterConfig()
    """One for all stages."""
    common: dict[str, dict[str, Any]] = {}
    """Kind (or `all`: of those that run on the cluster) -> config under that of every such stage."""
    eval: dict[str, Any] | None = None
    """Config of kind `sample`: held-out prompts in `data.train`, and the rewards that measure. `model` is each stage's own."""
    eval_by: str | None = "source"
    """Column by which accuracy is told apart."""
    samples_shown: PositiveInt = 6
    """Held-out prompts whose answers after every stage are in the report."""
    assume: AssumeConfig = AssumeConfig()
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
