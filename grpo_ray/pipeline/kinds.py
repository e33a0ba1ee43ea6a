"""The kinds of stages: the schema and the outputs of each."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_ray.config.base import Strict
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.datagen.filters.config import MixConfig, PairsConfig, PromptsConfig


@dataclass(frozen=True)
class Kind:
    schema: type[Strict]
    run: str | None
    """The controller's name for it; None: it has no run on the cluster."""
    outputs: dict[str, str]
    """Name -> path in the stage's folder."""
    trains: bool = False
    """Whether it has checkpoints to resume from."""
    policy: bool = False
    """Whether its `model` answers prompts, so that the pipeline's `eval` can measure it."""


KINDS = {
    "sft": Kind(SftConfig, "sft", {"model": "hf"}, trains=True, policy=True),
    "train": Kind(RunConfig, "grpo", {"model": "hf"}, trains=True, policy=True),
    "dpo": Kind(DpoConfig, "dpo", {"model": "hf"}, trains=True, policy=True),
    "reward_model": Kind(RewardModelConfig, "reward_model", {"model": "hf"}, trains=True),
    "sample": Kind(RunConfig, "sample", {"samples": "samples"}),
    "data": Kind(MixConfig, None, {"data": "data.jsonl"}),
    "pairs": Kind(PairsConfig, None, {"data": "pairs.jsonl"}),
    "prompts": Kind(PromptsConfig, None, {"data": "prompts.jsonl"}),
}
EVAL = "eval"
"""The kind of a `sample` stage that is added to a stage which makes a model, as `NAME-eval`."""
