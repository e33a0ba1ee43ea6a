"""The schema of `algorithm`: what is learned from a batch. Formulas and sources are in `algorithm/advantages.py` and
`algorithm/losses/`.

`algorithm: NAME` takes a preset (`presets.py`); combinations that would not do what they say are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from grpo_ray.config.base import NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.presets import SEQUENCE_LOSSES, with_preset

TOKEN_CLIP_LOSSES = ("grpo", "dr_grpo", "dapo")


class AlgorithmConfig(Strict):
    preset: str | None = None
    """A name of `grpo_ray.config.presets.PRESETS`; whatever else is given goes over its values."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "batch_std", "process", "gae"] = "grpo"
    """R is compared with the mean of its group, and divided by: the group's std (grpo), nothing (dr_grpo, rloo), the
    batch's std of what is left (reinforce_pp_baseline) or of the rewards (batch_std). process: the rewards of the steps of a
    group are compared as in grpo, and a token has the sum over the steps that end at it or after it; reward functions may give
    `[(end, reward), ..]` for a sample, which ends the run under any other kind. gae: PPO's, by a critic."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of gae."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of gae. On MATH 1.0 comes near GRPO, 0.95 stays clearly below (DeepSeek-R1, A.3)."""
    std_ddof: Literal[0, 1] = 1
    std_eps: NonNegFloat = 1e-4
    """Added to the standard deviation. Whatever it is, rewards of a group that differ by a millionth of the largest or less are
    taken for equal, and their advantages are 0."""

    loss: Literal["grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo"] = "grpo"
    """Clipped token ratio as the mean of sequence means (grpo), / (sequences x max length) (dr_grpo), / all tokens
    (dapo); ratio of a whole sequence: R1's (grpo_sequence), by the token (gspo), each token clipped (gmpo); capped
    weight (cispo); soft gate (sapo)."""
    epsilon_low: NonNegFloat = 0.2
    epsilon_high: NonNegFloat = 0.2
    """How far the ratio may leave 1 before it is clipped; gmpo: the logarithm of the ratio may leave 0. The defaults of
    gspo are 3e-4 and 4e-4, those of gmpo 0.4."""
    dual_clip_c: Annotated[float, Field(gt=1)] | None = None
    """For A < 0 the loss is at most -c A; verl's clip_ratio_c, there 3. None: unbounded, as in PPO."""
    cispo_max_ratio: PositiveFloat = 5.0
    """The cap itself: TRL's epsilon_high, 1 + verl's clip_ratio_high."""
    sapo_temperature_pos: PositiveFloat = 1.0
    sapo_temperature_neg: PositiveFloat = 1.05
    entropy_coef: NonNegFloat = 0.0
    """The loss minus this x the entropy, summed over tokens with the weights of the loss (as in verl)."""

    beta: NonNegFloat = 0.0
    """Weight of the KL to the reference model; 0 keeps no reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of it, GRPO's. reward: beta x KL(old || reference) is taken off the reward before the advantages are made: off
    each token's for gae (PPO 1909.08593), summed over its tokens off a sample's for the others (RLOO 2402.14740; TRL's
    RLOOTrainer). verl's use_kl_in_reward. Truncated samples out of the loss have it too (TRL: not)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "k3_unbiased"] = "k3"
    """The default of kl_in reward is k1, the papers' difference of log-probabilities. `k3+` and `k3_unbiased` are made for their
    gradient, which a reward has none of."""
    ref_refresh_steps: NonNegInt = 0
    """Every so many steps the reference takes over the policy's weights. 0: it stays what it was at the start."""
    ref_polyak_tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Then reference = tau x policy + (1 - tau) x reference; TRL's ref_model_mixup_alpha."""

    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """What the ratio is taken to: the learner's own value for the version that sampled, or what the sampler reported
    (verl's bypass mode). Either is over the tokens that rollout.top_p, top_k and min_p leave."""
    importance_sampling: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = None
    """How sampler and learner are brought together, in TRL's words: token_truncate is TIS, token_mask MIS and IcePop."""
    importance_sampling_clip_min: NonNegFloat = 0.0
    importance_sampling_clip_max: PositiveFloat = 2.0
    """Defaults: token_truncate at most 2, token_mask 0.5 to 5, of a sequence at most 3."""
    geometric_mask: tuple[NonNegFloat, PositiveFloat] | None = None
    """Drop sequences whose geometric mean of the ratio old/rollout, of learner to sampler, leaves these bounds, e.g. [0.99, 1.01]:
    exp(mean_t(old_t - rollout_t)). verl's rollout_rs: seq_mean_k1 bounds rollout/old: its threshold `low_high` is
    [1 / high, 1 / low] here, so 0.99_1.02 is [0.98039, 1.0101]."""
    off_policy_mask_threshold: NonNegFloat | None = None
    """Drop sequences with A < 0 that the policy has come to like less than this allows (nats a token)."""

    dynamic_sampling: bool = False
    """Groups whose scores (under process: of all steps) are all equal are dropped and replaced by the next prompts. A KL in the
    reward does not count: it says nothing of the task."""
    max_sampling_rounds: PositiveInt = 10
    """A step's budget of dynamic sampling, in batches of prompts; when it is spent, the step trains on what it has."""
    max_steps_without_signal: NonNegInt = 10
    """The run ends with an error after so many steps in a row that had nothing to learn from: no reward applies, all samples of
    each prompt have the same one, or all that differ are out of the loss. So does a run of several steps of which none had
    anything. 0: it never does."""
    mask_truncated: bool = False
    """Samples cut at rollout.max_completion_length take part in the baseline, but not in the loss (DAPO's overlong
    filtering; TRL's mask_truncated_completions)."""

    num_iterations: PositiveInt = 1
    """Passes over each batch (the paper's mu)."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps in one pass."""
    max_staleness: NonNegInt = 0
    """Policy updates between a sample's oldest token and its use: sampling runs so far ahead. 0: on-policy. Above 0 the default
    of importance_sampling is token_truncate (sequence_truncate for losses with a sequence's ratio): decoupled PPO, whose ratio is
    to the policy before the update, AReaL 2505.24298."""

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
            if self._given(name) and loss != owner:
                raise ValueError(
                    f"algorithm.{name} is of loss {owner} and does nothing with {loss}; take one of them out"
                )
        if self.dual_clip_c is None:
            return self
        if loss not in TOKEN_CLIP_LOSSES:
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
        if self.advantage in ("gae", "process") and self.loss in SEQUENCE_LOSSES:
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
        """A critic, or the log-probabilities for a KL, are only there."""
        return self.advantage == "gae" or self.kl_in == "reward"

    def _given(self, *names: str) -> str | None:
        """The first of these that is not at its default. (A resolved config names every key.)"""
        fields = type(self).model_fields
        return next((n for n in names if getattr(self, n) != fields[n].default), None)
