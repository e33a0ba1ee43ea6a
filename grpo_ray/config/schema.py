"""The schema of a GRPO run. Every default exists here and in the file of its section, once; `grpo-ray check` prints the
resolved whole.

    model  data  rollout  environment  reward  algorithm  learner     sections
    common                                                        the sections that every training run has
    schema (`grpo-ray train`)   supervised (`sft`, `dpo`, `reward-model`)     whole runs
    loading                                                       from YAML and `key=value` to one of these, and back

Names follow TRL and verl where both mean the same. Times are in seconds (`_s`), sizes in bytes or GiB as named.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.base import PositiveInt, check_temperature
from grpo_ray.config.common import CommonConfig
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.learner import CriticConfig, WeightsConfig, check_precision
from grpo_ray.config.reward import SHARED_POOL, RewardConfig
from grpo_ray.config.rollout import EvalConfig, RolloutConfig, SampleConfig
from grpo_ray.errors import ConfigError


class RunConfig(CommonConfig):
    """A GRPO run: `grpo-ray train`."""

    prompts_per_step: PositiveInt = 32
    """P, the number of prompts per step (verl's train_batch_size). A step trains on P x rollout.num_generations samples."""

    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig | None = None
    """Environments and tools of episodes over several turns. None: a prompt has one answer."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    weights: WeightsConfig = WeightsConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def colocated(self) -> bool:
        return self.cluster.placement == "colocated"

    @property
    def engines_match_learners(self) -> bool:
        """Whether engines have as many GPUs as there are learner ranks, so that both can share all of them."""
        return self.rollout.num_actors * self.rollout.engine_size == self.learner.num_actors

    @property
    def reward_titles(self) -> list[str]:
        """The names of all rewards: those of functions, then those that environments give."""
        return [*(f.title for f in self.reward.functions), *(self.environment.titles if self.environment else ())]

    @property
    def reward_pools(self) -> dict[str, RewardConfig]:
        """The pools of reward workers by name; one without functions, where environments give all rewards, for it joins them."""
        return self.reward.pools or {SHARED_POOL: self.reward}

    @property
    def samples_under_way(self) -> int:
        """The largest number of samples in progress at once."""
        return (self.algorithm.max_staleness + 1) * self.prompts_per_step * self.rollout.num_generations

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        _check_rewards(self)
        _check_batch(self)
        _check_reference(self)
        _check_sampling(self)
        _check_routing(self)
        _check_environment(self)
        _check_colocated(self)
        if self.model.sends_adapters and self.weights != WeightsConfig():
            raise ValueError(
                "weights is about sending the whole model, which model.lora.transfer adapter never does: take it out, or use "
                "model.lora.transfer merged"
            )
        if self.critic != CriticConfig() and self.algorithm.advantage != "gae":
            raise ValueError("critic is PPO's value model: it needs algorithm.advantage gae (or algorithm: ppo)")
        check_precision(self.model, self.learner)
        return self


def _check_rewards(config: RunConfig) -> None:
    if not config.reward_titles:
        raise ValueError("reward.functions is empty: name at least one reward, e.g. [{name: accuracy}]")
    names = config.reward_titles
    if (twice := next((n for n in names if names.count(n) > 1), None)) is not None:
        raise ValueError(
            f"reward.functions has {twice!r} more than once, and their metrics could not be told apart; give each a label"
            if twice not in (config.environment.titles if config.environment else ())
            else f"{twice!r} is a reward of reward.functions and of the environment; give the function a label"
        )
    if config.eval.accuracy is not None and config.eval.accuracy not in names:
        raise ValueError(f"eval.accuracy is {config.eval.accuracy!r}, which is none of reward.functions: {names}")


def _check_batch(config: RunConfig) -> None:
    """Check that the batch divides into mini-batches, learner ranks and micro-batches."""
    samples = config.prompts_per_step * config.rollout.num_generations
    if config.algorithm.num_mini_batches > config.prompts_per_step:
        raise ValueError(
            f"algorithm.num_mini_batches ({config.algorithm.num_mini_batches}) is more than "
            f"prompts_per_step ({config.prompts_per_step}): a mini-batch holds at least one group"
        )
    if config.learner.data_parallel_size > samples:
        raise ValueError(
            f"learner.num_actors ({config.learner.num_actors}) is more than the {samples} samples of a step; "
            "lower it, or raise prompts_per_step or learner.sequence_parallel_size"
        )
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    if config.learner.micro_batch_tokens < longest and not config.learner.micro_batch_is_open:
        raise ValueError(
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) can't hold one sample of up to {longest} tokens "
            "(data.max_prompt_length + rollout.max_completion_length); raise it"
        )


def _check_reference(config: RunConfig) -> None:
    if config.algorithm.ref_refresh_steps and config.model.lora is not None:
        raise ValueError(
            "algorithm.ref_refresh_steps needs a reference model of its own, and with model.lora the policy without its "
            "adapters is the reference: take one of them out"
        )
    if config.algorithm.ref_polyak_tau < 1 and config.model.dtype == "bfloat16":
        raise ValueError(
            "algorithm.ref_polyak_tau below 1 moves the reference by steps that model.dtype bfloat16 rounds away; use "
            "float32, or take the policy over whole (tau 1) every algorithm.ref_refresh_steps"
        )


def _check_sampling(config: RunConfig) -> None:
    check_temperature("rollout", config.rollout.temperature)
    check_temperature("eval", config.eval.temperature)
    check_temperature("sample", config.sample.temperature)
    if config.rollout.truncation and config.algorithm.max_staleness:
        raise ValueError(
            f"rollout.{config.rollout.truncation} leaves out tokens by the policy that samples, and with algorithm.max_staleness "
            f"{config.algorithm.max_staleness} the learner no longer has that one: it could not renormalise over what is left. "
            "Use max_staleness 0, or top_p 1, top_k 0 and min_p 0"
        )


def _check_routing(config: RunConfig) -> None:
    if not config.rollout.keep_routing:
        return
    slices = config.learner.sequence_parallel_size
    wrong = {
        "rollout.speculative: a draft's tokens are routed before it is known which are kept": config.rollout.speculative,
        "model.compile: it makes one program of a layer, with the router's own choice": config.model.compile,
        f"learner.sequence_parallel_size {slices}: a learner has a slice of the tokens": slices > 1,
        "environment: the turns of an episode are sampled apart, and their experts are not put together": config.environment,
    }
    if (why := next((text for text, is_so in wrong.items() if is_so), None)) is not None:
        raise ValueError(f"rollout.keep_routing does not go with {why}; leave one of them out")


def _check_environment(config: RunConfig) -> None:
    environment = config.environment
    if environment is None:
        return
    if config.data.template.partition(":")[0] not in ("chat", "r1"):
        raise ValueError(
            f"environment needs a chat template for its turns, and data.template is {config.data.template!r}; set it to chat"
        )
    # An episode whose environment fails is played twice.
    if 2 * environment.episode_timeout_s > config.deadlines.sample_s:
        raise ValueError(
            f"environment.episode_timeout_s ({environment.episode_timeout_s:g}) is more than half of deadlines.sample_s "
            f"({config.deadlines.sample_s:g}), which would end an episode that is drawn again; lower the first or raise the second"
        )


def check_correction(config: RunConfig) -> None:
    """Raises ConfigError for training on samples of a rounded policy without a correction for it."""
    a, rounds = config.algorithm, config.rollout.reduced_precision
    if rounds and a.importance_sampling is None and a.old_logprobs == "recompute":
        raise ConfigError(
            f"{rounds}: what is sampled is not quite the policy that is trained, and nothing corrects for it; set "
            "algorithm.importance_sampling, e.g. token_truncate (TIS), or algorithm.old_logprobs rollout"
        )


def _check_colocated(config: RunConfig) -> None:
    if not config.colocated:
        return
    if ahead := config.algorithm.max_staleness:
        raise ValueError(
            f"algorithm.max_staleness is {ahead}, and with cluster.placement colocated samplers and learners take turns, so "
            "sampling can't run ahead: use 0, or placement disaggregated"
        )
    if config.rollout.max_actors is not None:
        raise ValueError(
            "rollout.max_actors lets the number of samplers change, and with cluster.placement colocated there is one for each "
            "learner: take it and min_actors out, or use placement disaggregated"
        )
    if config.rollout.labels != config.learner.labels:
        raise ValueError(
            f"with cluster.placement colocated an engine and a learner are on one node: rollout.labels {config.rollout.labels} "
            f"and learner.labels {config.learner.labels} have to be the same"
        )
