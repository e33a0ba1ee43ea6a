"""The schema of a pipeline: `grpo-ray pipeline`.

    name: r1
    common: {train: {learner: {zero_stage: 3}}}          # under every stage of a kind; `all`: under every one of them
    eval: {data: {train: {path: held_out.jsonl}}, ..}    # sampled after each stage that makes a model
    stages:
      zero: {kind: train, config: {model: {path: base}, ..}}
      traces: {kind: sample, config: {model: {path: "${stages.zero.model}"}, ..}}

`${stages.NAME.OUTPUT}` is the path of a stage's output (kinds.py lists them), and a stage needs all stages that it references so.
`${seed}` is the pipeline's.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from grpo_ray.config.base import HomePath, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.common import ClusterConfig

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class GateConfig(Strict):
    """A condition on a stage that must hold before the next ones begin."""

    metric: str
    """The metric of the stage, by its name in the report: `accuracy`, `accuracy/add`, `length`, `reward/NAME`, `num_rows`."""
    at_least: float | None = None
    at_most: float | None = None
    not_below: str | None = None
    """Another stage: the metric must not be less than there by more than `by`."""
    by: float = 0.0
    """The tolerance of `not_below`."""

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
    """A one-line note for the plan and the report."""
    recipe: HomePath | None = None
    """A recipe that `config` overrides."""
    needs: tuple[StageName, ...] = ()
    """Stages to wait for besides those that `config` references."""
    config: dict[str, Any] = {}
    gate: tuple[GateConfig, ...] = ()
    eval: bool | dict[str, Any] = True
    """Whether to measure the resulting model by the pipeline's `eval`; a mapping overrides that, e.g. for another template."""


class AssumeConfig(Strict):
    """Assumptions of `--dry-run`, where no stage of the kind has been measured yet."""

    completion_tokens: PositiveFloat | None = None
    """The completion tokens of a sample. None: half of its limit."""
    prompt_tokens: PositiveFloat | None = None
    """The prompt tokens of a sample. None: half of its limit."""
    tokens_per_s: dict[str, PositiveFloat] = {}
    """Kind of stage -> tokens that it processes in a second, start-up aside."""
    rows: dict[str, PositiveInt] = {}
    """The rows of data sets on the hub, by their path, and of the output of data stages, by their name."""
    start_s: PositiveFloat = 60.0
    """The start-up time of a stage: engines and learner ranks."""


class PipelineConfig(Strict):
    name: str | None = None
    """The folder under `dir`. None: the recipe's name. Running it again continues it."""
    dir: HomePath = "runs"
    seed: int = 1
    cluster: ClusterConfig = ClusterConfig()
    """The cluster of all stages."""
    common: dict[str, dict[str, Any]] = {}
    """Kind (or `all`: of those that run on the cluster) -> config that every such stage overrides."""
    eval: dict[str, Any] | None = None
    """Config of kind `sample`: held-out prompts in `data.train`, and the rewards that measure. `model` is each stage's own."""
    eval_by: str | None = "source"
    """The column by which accuracy is split."""
    samples_shown: PositiveInt = 6
    """The number of held-out prompts whose answers after every stage are in the report."""
    assume: AssumeConfig = AssumeConfig()
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
