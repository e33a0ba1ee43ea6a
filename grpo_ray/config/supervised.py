"""The schemas of supervised runs: `grpo-ray sft`, `dpo` and `reward-model`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from grpo_ray.config.base import PositiveFloat, PositiveInt, Strict
from grpo_ray.config.common import CommonConfig
from grpo_ray.config.learner import check_precision


class SftConfig(CommonConfig):
    """Supervised fine-tuning with the same learner: `grpo-ray sft`."""

    examples_per_step: PositiveInt = 128
    max_length: PositiveInt = 1024
    """The largest number of tokens of prompt and completion; longer examples are dropped or refused (data.long_prompts)."""

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if self.learner.micro_batch_tokens < self.max_length and not self.learner.micro_batch_is_open:
            raise ValueError(
                f"learner.micro_batch_tokens ({self.learner.micro_batch_tokens}) can't hold one example of max_length "
                f"({self.max_length}) tokens; raise it"
            )
        if self.model.sends_adapters:
            raise ValueError(
                "model.lora.transfer adapter is how samplers get the adapters, and fine-tuning has no samplers: take it out"
            )
        if self.learner.data_parallel_size > self.examples_per_step:
            raise ValueError(
                f"learner.num_actors ({self.learner.num_actors}) is more than examples_per_step ({self.examples_per_step})"
            )
        check_precision(self.model, self.learner)
        return self


class DpoOptions(Strict):
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO 2305.18290. ipo: 2310.12036, on means over tokens."""
    beta: PositiveFloat = 0.1
    """The strength of the penalty on leaving the reference, which is the model at the start."""


class DpoConfig(SftConfig):
    """Direct preference optimisation: `grpo-ray dpo`. Its examples are pairs; `max_length` bounds a prompt with either answer."""

    dpo: DpoOptions = DpoOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_room_for_pairs(self)
        return self


class RewardModelOptions(Strict):
    loss: Literal["bradley_terry", "bce", "mse"] = "bradley_terry"
    """bradley_terry: pairs (`prompt`, `chosen`, `rejected`). bce, mse: single answers (`prompt`, `completion`, `label`), a label
    in [0, 1] or any number."""
    use_margin: bool = False
    """Whether the scores of a pair should differ by at least the row's column `margin` (Llama 2 2307.09288)."""

    @property
    def pairwise(self) -> bool:
        return self.loss == "bradley_terry"

    @model_validator(mode="after")
    def _margin(self) -> Self:
        if self.use_margin and not self.pairwise:
            raise ValueError(
                f"reward_model.use_margin is about pairs, and reward_model.loss is {self.loss}; take one of them out"
            )
        return self


class RewardModelConfig(SftConfig):
    """Training of a reward model: `grpo-ray reward-model`. DeepSeek-R1 used batch 256, rate 6e-6, one epoch of 66,000 pairs."""

    reward_model: RewardModelOptions = RewardModelOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.reward_model.pairwise:
            _check_room_for_pairs(self)
        if self.model.lora is not None:
            raise ValueError("model.lora would leave a reward model's output layer untrained: train it whole")
        return self


def preferences(config: CommonConfig) -> DpoOptions | RewardModelOptions | None:
    """The options for learning from preferences; None if the run learns from something else."""
    match config:
        case DpoConfig():
            return config.dpo
        case RewardModelConfig():
            return config.reward_model
    return None


def _check_room_for_pairs(config: SftConfig) -> None:
    if config.learner.micro_batch_tokens < 2 * config.max_length and not config.learner.micro_batch_is_open:
        raise ValueError(
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) can't hold the two answers of a pair of max_length "
            f"({config.max_length}) tokens each; raise it to {2 * config.max_length}"
        )
