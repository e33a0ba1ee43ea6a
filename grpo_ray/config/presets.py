"""Algorithms by name: `algorithm: dapo`, or `algorithm: {preset: dapo, epsilon_high: 0.3}`.

A preset holds only what its paper says about the algorithm. Batch sizes, lengths, learning rates and rewards belong to a
recipe; those of the papers are listed here for recipe authors. What a preset leaves out keeps the schema's default.
"""

from __future__ import annotations

from typing import Any

from grpo_ray.suggest import did_you_mean

Values = dict[str, Any]

SEQUENCE_LOSSES = ("grpo_sequence", "gspo", "gmpo")
"""The losses whose ratio is of the whole sequence."""

LOSS_DEFAULTS: dict[str, Values] = {
    "gspo": {"epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "gmpo": {"epsilon_low": 0.4, "epsilon_high": 0.4},
}
"""Defaults of losses whose bounds mean something else than PPO's 0.2: GSPO 2507.18071, section 5.1; GMPO 2507.20673, section
4.1."""

IMPORTANCE_SAMPLING_DEFAULTS: dict[str, Values] = {
    "token_truncate": {"importance_sampling_clip_min": 0.0, "importance_sampling_clip_max": 2.0},
    "token_mask": {"importance_sampling_clip_min": 0.5, "importance_sampling_clip_max": 5.0},
    "sequence_truncate": {"importance_sampling_clip_min": 0.0, "importance_sampling_clip_max": 3.0},
    "sequence_mask": {"importance_sampling_clip_min": 0.0, "importance_sampling_clip_max": 3.0},
}
"""The default bounds of each correction. TIS: 2. IcePop (Ring-1T 2510.18855): 0.5 and 5. Per sequence: TRL's 3."""

_OF_THE_LOSS = (
    "epsilon_low",
    "epsilon_high",
    "dual_clip_c",
    "cispo_max_ratio",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
)
KL_IN_DEFAULTS: dict[str, Values] = {"reward": {"kl_estimator": "k1"}}
"""The default estimator of a KL in the reward: PPO 1909.08593, RLOO 2402.14740; the estimators of the presets are for a loss."""

_OF_THE_REFERENCE = ("kl_estimator", "ref_refresh_steps", "ref_polyak_tau")

_GRPO: Values = {"advantage": "grpo", "loss": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0}

PRESETS: dict[str, Values] = {
    # DeepSeekMath 2402.03300, section 4.2: beta 0.04, one update a batch, lr 1e-6, 64 samples of up to 1,024 tokens, batch
    # of 1,024. The clip range is not stated there; 0.2 is PPO's.
    "grpo": _GRPO | {"beta": 0.04, "kl_estimator": "k3"},
    # DeepSeek-R1 2501.12948 v2: the ratio of the whole sequence, epsilon 10, beta 0.001, the reference replaced every 400
    # steps. lr 3e-6, 32 questions x 16 samples a step, temperature 1; 16 such steps were sampled at once, which is
    # `prompts_per_step: 512`, `num_mini_batches: 16` and `ref_refresh_steps: 25` here.
    "r1": _GRPO
    | {
        "loss": "grpo_sequence",
        "epsilon_low": 10.0,
        "epsilon_high": 10.0,
        "beta": 0.001,
        "kl_estimator": "k3",
        "ref_refresh_steps": 400,
    },
    # Dr. GRPO 2503.20783: neither the std nor the length divides; no KL.
    "dr_grpo": _GRPO | {"advantage": "dr_grpo", "loss": "dr_grpo"},
    # DAPO 2503.14476, section 4.1: clip higher, token-level loss, dynamic sampling, no KL. 512 prompts x 16 samples in 16
    # mini-batches, lr 1e-6; the soft overlong punishment is a reward function, `soft_overlong`.
    "dapo": _GRPO | {"loss": "dapo", "epsilon_high": 0.28, "dynamic_sampling": True},
    # PPO 1707.06347 with a critic, in its usual form for reasoning (verl): token-level loss, lambda 1, several
    # mini-batches. Its KL was in the reward (1909.08593): `{preset: ppo, beta: 0.05, kl_in: reward}`.
    "ppo": _GRPO | {"advantage": "gae", "gamma": 1.0, "lam": 1.0, "loss": "dapo", "num_mini_batches": 2},
    # RLOO 2402.14740: the others' mean as baseline, the sequence as one action. The paper's KL is in the reward, which is
    # `{preset: rloo, beta: 0.05, kl_in: reward}`; here beta is 0.
    "rloo": _GRPO | {"advantage": "rloo", "loss": "grpo_sequence"},
    # REINFORCE++ with baseline 2501.03262, section 3: the group's mean, the batch's std, and the k2 estimator wherever a
    # KL is asked for; its weight is the one of OpenRLHF's script.
    "reinforce_pp": _GRPO | {"advantage": "reinforce_pp_baseline", "loss": "dapo", "beta": 0.001, "kl_estimator": "k2"},
    # Lite-PPO 2508.08221: the group's mean, the batch's std, token-level loss; no KL.
    "lite_ppo": _GRPO | {"advantage": "batch_std", "loss": "dapo"},
    # GSPO 2507.18071: the bounds are in LOSS_DEFAULTS; four mini-batches there.
    "gspo": {"advantage": "grpo", "loss": "gspo", "beta": 0.0},
    # CISPO, MiniMax-M1 2506.13585: no KL; the cap, which is not stated there, is ScaleRL's (2510.13786).
    "cispo": {"advantage": "grpo", "loss": "cispo", "cispo_max_ratio": 5.0, "beta": 0.0},
    # SAPO 2511.20347, section 5; beta is not stated.
    "sapo": {
        "advantage": "grpo",
        "loss": "sapo",
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "beta": 0.0,
    },
    # GMPO 2507.20673: the bounds are in LOSS_DEFAULTS.
    "gmpo": {"advantage": "grpo", "loss": "gmpo", "beta": 0.0},
    # IcePop, Ring-1T 2510.18855: GRPO without the tokens on which rollout engine and learner disagree; the bounds are
    # in IMPORTANCE_SAMPLING_DEFAULTS.
    "icepop": _GRPO | {"importance_sampling": "token_mask"},
    # DeepSeek-V3.2 2512.02556, section 3.1: the unbiased KL, the off-policy sequence mask, R - mean; the clip is around
    # the rollout engine's own logps. beta and the mask's threshold are not stated: R1's, and ours. Its "keep sampling
    # mask" is what the learner does whenever rollout.top_p, top_k or min_p leave tokens out.
    "v3_2": _GRPO
    | {
        "advantage": "dr_grpo",
        "beta": 0.001,
        "kl_estimator": "k3_unbiased",
        "off_policy_mask_threshold": 0.5,
        "old_logprobs": "rollout",
    },
}
"""`algorithm.preset` -> values of `algorithm`, each with its source."""


def with_preset(data: Values) -> Values:
    """The given options, over the preset that they name, over the defaults of its loss and its correction. With another loss, the
    preset's bounds have no meaning; without a KL, its estimator and its reference have none, and with a KL in the reward its
    estimator has none.

    Raises:
        ValueError: there is no such preset.
    """
    name = data.get("preset")
    if name is not None and name not in PRESETS:
        known = f"known are {', '.join(PRESETS)}"
        raise ValueError(f"algorithm.preset {name!r} is not known; {did_you_mean(str(name), PRESETS, then=known)}")
    preset = PRESETS[name] if name is not None else {}
    without: tuple[str, ...] = _OF_THE_LOSS if data.get("loss", preset.get("loss")) != preset.get("loss") else ()
    without += _OF_THE_REFERENCE if data.get("beta") == 0 else ()
    without += ("kl_estimator",) if data.get("kl_in") == "reward" else ()
    given = {key: value for key, value in preset.items() if key not in without} | data
    if (given.get("max_staleness") or 0) > 0 and given.get("old_logprobs") != "rollout":
        sequence = given.get("loss") in SEQUENCE_LOSSES
        given = {"importance_sampling": "sequence_truncate" if sequence else "token_truncate"} | given
    usual = LOSS_DEFAULTS.get(str(given.get("loss")), {})
    usual = usual | IMPORTANCE_SAMPLING_DEFAULTS.get(str(given.get("importance_sampling")), {})
    usual = usual | KL_IN_DEFAULTS.get(str(given.get("kl_in")), {})
    return usual | given
