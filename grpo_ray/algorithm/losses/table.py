"""The policy losses that `algorithm.loss` names."""

from __future__ import annotations

from grpo_ray.algorithm.losses import cispo, dapo, dr_grpo, gmpo, grpo, grpo_sequence, gspo, sapo
from grpo_ray.algorithm.losses.policy import PolicyLoss

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": grpo.LOSS,
    "grpo_sequence": grpo_sequence.LOSS,
    "dr_grpo": dr_grpo.LOSS,
    "dapo": dapo.LOSS,
    "gspo": gspo.LOSS,
    "cispo": cispo.LOSS,
    "sapo": sapo.LOSS,
    "gmpo": gmpo.LOSS,
}
