"""The schema of `algorithm`: what is learned from a batch. Formulas and sources are in `algorithm/advantages.py` and
`algorithm/losses/`.

`algorithm: NAME` takes a preset (`presets.py`); combinations that would not do what they say are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from grpo_ray.config.base import (
    HOW_TO_NAME,
    NonNegFloat,
    NonNegInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    expand_home,
    is_users,
)
from grpo_ray.config.presets import SEQUENCE_LOSSES, with_preset
from grpo_ray.suggest import did_you_mean

LOSSES = ("grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo")
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "batch_std", "process", "gae")
TOKEN_ADVANTAGES = ("gae", "process")
"""They give every token an advantage of its own."""

TOKEN_CLIP_LOSSES = ("grpo", "dr_grpo", "dapo")


def _built_in_or_users(name: str, info: ValidationInfo) -> str:
    known = {"loss": LOSSES, "advantage": ADVANTAGES}[str(info.field_name)]
    if is_users(name):
        return expand_home(name, info)
    if name not in known:
        hint = did_you_mean(name, known, then=f"built in are {', '.join(known)}.", cutoff=0.5)
        raise ValueError(f"algorithm.{info.field_name} {name!r} is not known; {hint} {HOW_TO_NAME}")
    return name


BuiltInOrUsers = Annotated[str, AfterValidator(_built_in_or_users)]
"""The name of a built-in, or of a function of the recipe's own (`launch/guide/extend.md`)."""


class AlgorithmConfig(Strict):
    preset: str | None = None
    """The name of a preset in `grpo_ray.config.presets.PRESETS`; the other options given here override its values."""
    package: str | None = None
    """The installed package whose functions `loss` and `advantage` are; see `reward.functions`."""

    advantage: BuiltInOrUsers = "grpo"
    """The baseline is the mean reward of the group; the difference is divided by the group's std (grpo), by nothing (dr_grpo,
    rloo), by the batch's std of the differences (reinforce_pp_baseline) or of the rewards (batch_std). process: the rewards of the
    steps of a group are compared as in grpo, and a token gets the sum over the steps that end at it or after it; reward functions
    may return `[(end, reward), ..]` for a sample, which ends the run under any other kind. gae: PPO's, with a critic. Or a function
    of your own, see launch/guide/extend.md."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The discount factor of gae."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The lambda of gae. On MATH 1.0 comes near GRPO, 0.95 stays clearly below (DeepSeek-R1, A.3)."""
    std_ddof: Literal[0, 1] = 1
    std_eps: NonNegFloat = 1e-4
    """The constant added to the standard deviation. Whatever it is, rewards of a group that differ by a millionth of the largest or
    less count as equal, and their advantages are 0."""

    loss: BuiltInOrUsers = "grpo"
    """The token losses average the clipped token ratio: the mean of sequence means (grpo), the sum / (sequences x max length)
    (dr_grpo) or / all tokens (dapo). The sequence losses use the ratio of a whole sequence: R1's (grpo_sequence), per token (gspo),
    with each token clipped (gmpo). cispo caps the weight, sapo has a soft gate. Or a function of your own, as `advantage`."""
    epsilon_low: NonNegFloat = 0.2
    epsilon_high: NonNegFloat = 0.2
    """How far the ratio may leave 1 before it is clipped; for gmpo, how far the logarithm of the ratio may leave 0. The defaults of
    gspo are 3e-4 and 4e-4, those of gmpo 0.4."""
    dual_clip_c: Annotated[float, Field(gt=1)] | None = None
    """The bound c: for A < 0 the loss is at most -c A; verl's clip_ratio_c, there 3. None: unbounded, as in PPO."""
    cispo_max_ratio: PositiveFloat = 5.0
    """The cap itself: TRL's epsilon_high, 1 + verl's clip_ratio_high."""
    sapo_temperature_pos: PositiveFloat = 1.0
    sapo_temperature_neg: PositiveFloat = 1.05
    entropy_coef: NonNegFloat = 0.0
    """The coefficient of the entropy bonus; entropies are summed over tokens with the weights of the loss (as in verl), and
    subtracted."""

    beta: NonNegFloat = 0.0
    """The weight of the KL to the reference model; 0 keeps no reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: the KL is a term of the loss, as in GRPO. reward: beta x KL(old || reference) is subtracted from the reward before the
    advantages are computed: from each token's for gae (PPO 1909.08593), summed over its tokens from a sample's for the others (RLOO
    2402.14740; TRL's RLOOTrainer). This is verl's use_kl_in_reward. It also applies to truncated samples outside the loss (in TRL
    it does not)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "k3_unbiased"] = "k3"
    """The default with kl_in reward is k1, the papers' difference of log-probabilities. `k3+` and `k3_unbiased` are designed for
    their gradient, and a reward has none."""
    ref_refresh_steps: NonNegInt = 0
    """The number of steps between refreshes of the reference with the policy's weights. 0: it is never refreshed."""
    ref_polyak_tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The weight of the policy in such a refresh: reference = tau x policy + (1 - tau) x reference; TRL's ref_model_mixup_alpha."""

    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """The denominator of the ratio: the learner's own logps under the version that sampled, or the rollout engine's rollout_logps
    (verl's bypass mode). Both are over the tokens that rollout.top_p, top_k and min_p keep."""
    importance_sampling: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = None
    """The correction of the mismatch between rollout engine and learner, named as in TRL: token_truncate is TIS, token_mask MIS and
    IcePop."""
    importance_sampling_clip_min: NonNegFloat = 0.0
    importance_sampling_clip_max: PositiveFloat = 2.0
    """The upper bound of the correction. Defaults: token_truncate at most 2, token_mask 0.5 to 5, per sequence at most 3."""
    geometric_mask: tuple[NonNegFloat, PositiveFloat] | None = None
    """The bounds, e.g. [0.99, 1.01], of the geometric mean over a sequence of the ratio old/rollout, learner to rollout engine:
    exp(mean_t(old_t - rollout_t)); sequences outside are dropped. In verl's rollout_rs, seq_mean_k1 bounds rollout/old: its
    threshold `low_high` is [1 / high, 1 / low] here, so 0.99_1.02 is [0.98039, 1.0101]."""
    off_policy_mask_threshold: NonNegFloat | None = None
    """The largest mean of rollout_logps - logps (nats per token) of a sequence with A < 0; sequences above it are dropped."""

    dynamic_sampling: bool = False
    """Whether groups whose scores (under process: of all steps) are all equal are dropped and replaced by the next prompts. A KL in
    the reward does not count: it says nothing about the task."""
    max_sampling_rounds: PositiveInt = 10
    """The budget of dynamic sampling per step, in batches of prompts; once it is spent, the step trains on what it has."""
    max_steps_without_signal: NonNegInt = 10
    """The number of consecutive steps without a training signal after which the run ends with an error: no reward applies, all
    samples of each prompt have the same one, or all that differ are out of the loss. A run of several steps, none of which had a
    signal, ends so too. 0: never."""
    mask_truncated: bool = False
    """Whether samples truncated at rollout.max_completion_length, or at the end of the context, count for the baseline, but not for
    the loss (DAPO's overlong filtering; TRL's mask_truncated_completions). An episode that ended at another limit counts."""

    num_iterations: PositiveInt = 1
    """The number of passes over each batch (the paper's mu)."""
    num_mini_batches: PositiveInt = 1
    """The number of optimizer steps in one pass."""
    max_staleness: NonNegInt = 0
    """The largest number of policy updates between a sample's oldest token and its use, which is how far sampling runs ahead. 0:
    on-policy. Above 0 the default of importance_sampling is token_truncate (sequence_truncate for losses with a sequence ratio):
    decoupled PPO, whose ratio is to the policy before the update, AReaL 2505.24298."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        return with_preset(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _loss(self) -> Self:
        loss = self.loss
        clip = self._given("epsilon_low", "epsilon_high")
        if clip and loss == "cispo":
            raise ValueError(
                f"algorithm.{clip} does nothing with loss cispo, whose cap is algorithm.cispo_max_ratio "
                "(what TRL calls epsilon_high, and 1 + verl's clip_ratio_high); set that"
            )
        if clip and loss == "sapo":
            raise ValueError(
                f"algorithm.{clip} does nothing with loss sapo, which has no clip; set algorithm.sapo_temperature_pos, _neg"
            )
        for name, owner in (
            ("cispo_max_ratio", "cispo"),
            ("sapo_temperature_pos", "sapo"),
            ("sapo_temperature_neg", "sapo"),
        ):
            if self._given(name) and loss != owner and not is_users(loss):
                raise ValueError(
                    f"algorithm.{name} is of loss {owner} and does nothing with {loss}; take one of them out"
                )
        if self.dual_clip_c is None:
            return self
        if loss not in TOKEN_CLIP_LOSSES and not is_users(loss):
            raise ValueError(
                f"algorithm.dual_clip_c bounds the clipped token ratio of {', '.join(TOKEN_CLIP_LOSSES)}; loss {loss} has "
                "none: take it out"
            )
        if self.dual_clip_c <= 1 + self.epsilon_high:
            raise ValueError(
                f"algorithm.dual_clip_c ({self.dual_clip_c:g}) must be above 1 + epsilon_high ({1 + self.epsilon_high:g}), or it "
                "undoes the clip; 3 is usual"
            )
        return self

    @model_validator(mode="after")
    def _package(self) -> Self:
        if self.package is not None and not (is_users(self.loss) or is_users(self.advantage)):
            raise ValueError(
                f"algorithm.package {self.package!r} is whose loss or advantage is named, and both are built in; take it out"
            )
        return self

    @model_validator(mode="after")
    def _reference(self) -> Self:
        given = self._given("kl_in", "kl_estimator", "ref_refresh_steps", "ref_polyak_tau")
        if given and self.beta == 0:
            raise ValueError(
                f"algorithm.{given} does nothing with beta 0, which keeps no reference model; set algorithm.beta, or take it out"
            )
        if self.kl_in == "reward" and self.kl_estimator in ("k3+", "k3_unbiased"):
            raise ValueError(
                f"algorithm.kl_estimator {self.kl_estimator} differs from k3 in its gradient alone, and with kl_in reward there is "
                "none; use k1 (the papers'), k2 or k3"
            )
        if self.kl_in == "reward" and self.advantage == "process":
            raise ValueError(
                "algorithm.kl_in reward takes the KL off the reward of a sample or a token, and advantage process compares those "
                "of steps; use kl_in loss"
            )
        if self.ref_polyak_tau < 1 and not self.ref_refresh_steps:
            raise ValueError(
                "algorithm.ref_polyak_tau needs algorithm.ref_refresh_steps: how often the reference moves (1: every step)"
            )
        return self

    @model_validator(mode="after")
    def _correction(self) -> Self:
        kind = self.importance_sampling
        given = self._given("importance_sampling_clip_min", "importance_sampling_clip_max")
        if kind is None and given:
            raise ValueError(
                f"algorithm.{given} does nothing without algorithm.importance_sampling; set that, e.g. to token_truncate"
            )
        if self.old_logprobs == "rollout" and (kind is not None or self.geometric_mask is not None):
            name = "geometric_mask" if kind is None else "importance_sampling"
            raise ValueError(
                f"algorithm.{name} compares the learner's own log-probabilities with the sampler's, and old_logprobs rollout "
                "takes the sampler's for both: use old_logprobs recompute, or leave the correction to the ratio"
            )
        if kind is not None and kind.startswith("token") and self.loss in SEQUENCE_LOSSES:
            raise ValueError(
                f"algorithm.importance_sampling {kind} weighs tokens one by one, but the ratio of loss {self.loss} is of the whole "
                "sequence; use geometric_mask, sequence_truncate or sequence_mask"
            )
        for name, (low, high) in (
            (
                "importance_sampling_clip_min/max",
                (self.importance_sampling_clip_min, self.importance_sampling_clip_max),
            ),
            ("geometric_mask", self.geometric_mask or (0.99, 1.01)),
        ):
            if not low <= 1 <= high or low == high:
                raise ValueError(
                    f"algorithm.{name}: [{low:g}, {high:g}] must hold 1, the weight of a token on which sampler and learner agree"
                )
        return self

    @model_validator(mode="after")
    def _critic(self) -> Self:
        given = self._given("gamma", "lam")
        if given and self.advantage != "gae":
            raise ValueError(
                f"algorithm.{given} is of GAE and does nothing with advantage {self.advantage}; use advantage gae"
            )
        if self.advantage in TOKEN_ADVANTAGES and self.loss in SEQUENCE_LOSSES:
            raise ValueError(
                f"algorithm.advantage {self.advantage} gives every token its own advantage, and loss {self.loss} has one ratio for "
                "the whole sequence; use loss dapo or grpo"
            )
        if self.advantage == "gae" and self.dynamic_sampling:
            raise ValueError(
                "algorithm.dynamic_sampling drops groups without spread, which carry one for a critic; switch it off with gae"
            )
        return self

    @model_validator(mode="after")
    def _sampling(self) -> Self:
        if self._given("max_sampling_rounds") and not self.dynamic_sampling:
            raise ValueError(
                "algorithm.max_sampling_rounds is the budget of dynamic sampling; set dynamic_sampling: true"
            )
        return self

    @property
    def advantages_on_learner(self) -> bool:
        """Whether advantages are computed on the learner, the only place with a critic or the logps for a KL."""
        return self.advantage == "gae" or self.kl_in == "reward"

    def _given(self, *names: str) -> str | None:
        """The first of these options that is not at its default. (A resolved config names every key.)"""
        fields = type(self).model_fields
        return next((n for n in names if getattr(self, n) != fields[n].default), None)
