"""Advantages from rewards. Pure. P prompts, G samples of each; T tokens of one completion, B completions.

`group_advantages` gives one number a sample, by the name in `algorithm.advantage`. Process supervision (`process`) and GAE
(`gae`) give one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.batch.segments import Segments
from grpo_ray.spread import ABSOLUTE, RELATIVE, differ

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Rewards:
    """The rewards that every kind of advantage is computed from. Where the mask is False, `raw` and `centred` are 0."""

    raw_PG: Float[Tensor, "P G"]
    centred_PG: Float[Tensor, "P G"]
    """The rewards minus the mean of their group."""
    mask_PG: Bool[Tensor, "P G"]
    num_P1: Int[Tensor, "P 1"]
    """The number of the group's samples with a score."""
    ddof: int
    eps: float


def _grpo(r: Rewards) -> Float[Tensor, "P G"]:
    variance_P1 = r.centred_PG.square().sum(dim=1, keepdim=True) / (r.num_P1 - r.ddof).clamp(min=1)
    return r.centred_PG / (variance_P1.sqrt() + r.eps)


def _dr_grpo(r: Rewards) -> Float[Tensor, "P G"]:
    return r.centred_PG


def _rloo(r: Rewards) -> Float[Tensor, "P G"]:
    return r.centred_PG * r.num_P1 / (r.num_P1 - 1).clamp(min=1)


def _reinforce_pp_baseline(r: Rewards) -> Float[Tensor, "P G"]:
    # Every group is centred already: the batch mean that whitening subtracts is 0.
    return r.centred_PG / (_std(r.centred_PG, r.mask_PG, r.ddof) + r.eps)


def _batch_std(r: Rewards) -> Float[Tensor, "P G"]:
    return r.centred_PG / (_std(r.raw_PG, r.mask_PG, r.ddof) + r.eps)


Advantage = Callable[[Rewards], Tensor]
"""Rewards -> [P, G] advantages."""

ADVANTAGES: dict[str, Advantage] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "batch_std": _batch_std,
}
"""The functions that `algorithm.advantage` names."""


def group_advantages(
    rewards_PG: Float[Tensor, "P G"],
    *,
    kind: str | Advantage,
    ddof: int,
    eps: float,
    mask_PG: Bool[Tensor, "P G"] | None = None,
) -> Float[Tensor, "P G"]:
    """Compute how much better each sample is than its group.

    grpo: (R - mean) / (std + eps), DeepSeekMath 2402.03300 section 4.1.2 (ddof and eps are not stated there).
    dr_grpo: R - mean, 2503.20783.
    rloo: R - mean of the others = n / (n - 1) (R - mean), 2402.14740.
    reinforce_pp_baseline: R - mean, then divided by its std over the batch, 2501.03262 (there, as in verl, every token
        of the batch counts; here every sample).
    batch_std: (R - mean) / (std of all rewards of the batch + eps), Lite-PPO 2508.08221; TRL's `scale_rewards="batch"`.

    Args:
        rewards_PG: [P, G]. Masked entries may be NaN.
        kind: a name of ADVANTAGES, or a function like those of it.
        ddof: 1 for the sample's, 0 for the population's standard deviation.
        eps: added to the standard deviation.
        mask_PG: [P, G], False for samples without a score, which have no part in mean and std, and advantage 0. None: all have one.

    Returns:
        [P, G] in the dtype of the rewards. A group whose scores are all equal but for rounding (`grpo_ray/spread.py`), or fewer
        than two, is 0 exactly.
    """
    mask = torch.ones_like(rewards_PG, dtype=torch.bool) if mask_PG is None else mask_PG
    raw = rewards_PG.masked_fill(~mask, 0.0)
    num_P1 = mask.sum(dim=1, keepdim=True)
    centred = (raw - raw.sum(dim=1, keepdim=True) / num_P1.clamp(min=1)).masked_fill(~mask, 0.0)
    # Compared, not computed: the rounded mean of equal rewards may differ from each of them, and a small eps would magnify that.
    highest = raw.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    lowest = raw.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    largest = torch.maximum(highest.abs(), lowest.abs())
    flat = highest - lowest <= (RELATIVE * largest).clamp(min=ABSOLUTE)
    centred = centred.masked_fill(flat, 0.0)
    compare = ADVANTAGES[kind] if isinstance(kind, str) else kind
    return compare(Rewards(raw, centred, mask, num_P1, ddof, eps)).masked_fill(flat, 0.0)


def _std(values: Float[Tensor, "*D"], mask: Bool[Tensor, "*D"], ddof: int) -> Float[Tensor, ""]:
    """The standard deviation of the unmasked values, 0-dim."""
    num = mask.sum()
    off = (values - values.sum() / num.clamp(min=1)).masked_fill(~mask, 0.0)
    return (off.square().sum() / (num - ddof).clamp(min=1)).sqrt()


def process_advantages(
    step_rewards: Sequence[Float[Tensor, "_"]],
    step_ends: Sequence[Int[Tensor, "_"]],
    lengths: Sequence[int],
    *,
    ddof: int,
    eps: float,
) -> list[Float[Tensor, "_"]]:
    """Process supervision, DeepSeekMath 2402.03300 section 4.1.3: the rewards of all steps of a group's outputs are
    normalised together; a token's advantage is the sum over the steps that end at it or after it.

    Args:
        step_rewards: the rewards of each output of the group, [number of its steps].
        step_ends: the index of each step's last token, for each output [number of its steps].
        lengths: the length of each output in tokens.
        ddof: 1 for the sample's, 0 for the population's standard deviation.
        eps: added to the standard deviation.

    Returns:
        The advantages of each output, [T]. All 0 when all rewards are equal but for rounding.
    """
    pooled = torch.cat(list(step_rewards))
    spread = differ(pooled.tolist())
    scale = 1 / (_std(pooled, torch.ones_like(pooled, dtype=torch.bool), ddof) + eps) if spread else 0.0
    out = []
    for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True):
        per_token_T = rewards.new_zeros(length).index_add(0, ends, (rewards - pooled.mean()) * scale)
        out.append(per_token_T.flip(0).cumsum(0).flip(0))
    return out


def gae(
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantage estimation, 1506.02438 eq. 16, in verl's masked form.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    A masked token (padding, a tool's output) is skipped: the token before it sees the value and the advantage of
    the next token that counts. Nothing follows the last one.

    Args:
        rewards_BT: [B, T]; an outcome reward stands at the last token.
        values_BT: [B, T], the critic's.
        mask_BT: [B, T], True for tokens of the policy.
        gamma: discount.
        lam: lambda; 1 makes the advantage the return minus the value.

    Returns:
        Advantages and returns (advantages + values), [B, T] each, 0 where masked.
    """
    advantage_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(advantage_B)
    columns = []
    for t in reversed(range(values_BT.shape[1])):
        mask_B, value_B = mask_BT[:, t], values_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - value_B
        advantage_B = torch.where(mask_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(mask_B, value_B, next_value_B)
        columns.append(advantage_B)
    advantages_BT = torch.stack(columns[::-1], dim=1)
    return advantages_BT.masked_fill(~mask_BT, 0.0), (advantages_BT + values_BT).masked_fill(~mask_BT, 0.0)


def kl_in_reward(
    scores_B: Float[Tensor, "B"], kl_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], *, beta: float
) -> Float[Tensor, "B T"]:
    """Compute token rewards with the KL, as PPO and RLOO have it: -beta KL_t at every token, plus the score at the last.
    1909.08593 eq. 2; summed over tokens it is the reward of the whole completion.

    Args:
        scores_B: [B].
        kl_BT: [B, T], of a policy that is not being trained right now: no gradient goes through rewards.
        mask_BT: [B, T], True for tokens of the policy; at least one in each row.
        beta: weight of the KL.

    Returns:
        [B, T] token rewards, 0 where masked.
    """
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = places_T.where(mask_BT, -1).amax(dim=1)
    is_last_BT = places_T == last_B[:, None]
    return torch.where(mask_BT, -beta * kl_BT.detach(), 0.0) + torch.where(is_last_BT, scores_B[:, None], 0.0)


def gae_of_segments(
    scores_S: Float[Tensor, "S"],
    kl_C: Float[Tensor, "C"] | None,
    values_C: Float[Tensor, "C"],
    segments: Segments,
    *,
    beta: float,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """Compute `gae` over packed sequences, each with its score at its last token, minus the KL of every token.

    Args:
        scores_S: [S].
        kl_C: [C]; None: no KL in the reward.
        values_C: [C].
        segments: the sequence of each token.
        beta: weight of the KL.
        gamma: discount.
        lam: lambda of GAE.

    Returns:
        Advantages and returns, [C] each.
    """
    lengths_S = segments.lengths_S
    ends_S = lengths_S.cumsum(0)
    places_C = torch.arange(len(values_C), device=values_C.device) - (ends_S - lengths_S)[segments.index_N]
    shape = (len(lengths_S), int(lengths_S.max()))
    values_ST, kl_ST = values_C.new_zeros(shape), values_C.new_zeros(shape)
    values_ST[segments.index_N, places_C] = values_C
    if kl_C is not None:
        kl_ST[segments.index_N, places_C] = kl_C
    mask_ST = torch.arange(shape[1], device=values_C.device)[None] < lengths_S[:, None]
    rewards_ST = kl_in_reward(scores_S, kl_ST, mask_ST, beta=beta)
    advantages_ST, returns_ST = gae(rewards_ST, values_ST, mask_ST, gamma=gamma, lam=lam)
    return advantages_ST[segments.index_N, places_C], returns_ST[segments.index_N, places_C]
