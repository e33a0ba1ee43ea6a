"""Rewards of a group -> advantages. Pure; P prompts, G samples of each."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards_PG: Tensor, *, normalize_std: bool, ddof: int, eps: float, mask_PG: Tensor | None = None
) -> Tensor:
    """How much better each sample is than its group.

    grpo: (R - mean) / (std + eps), DeepSeekMath 2402.03300 section 4.1.2 (ddof and eps are not stated there).
    dr_grpo (`normalize_std=False`): R - mean, 2503.20783.

    Args:
        rewards_PG: [P, G]. What is masked out may be NaN.
        normalize_std: divide by the group's standard deviation.
        ddof: 1 for the sample's, 0 for the population's standard deviation.
        eps: added to the standard deviation.
        mask_PG: [P, G], False for samples without a score: no part in mean and std, advantage 0. None: all have one.

    Returns:
        [P, G] in the dtype of the rewards. A group whose scores are all equal (or fewer than two) is 0 exactly.
    """
    mask = torch.ones_like(rewards_PG, dtype=torch.bool) if mask_PG is None else mask_PG
    rewards = rewards_PG.masked_fill(~mask, 0.0)
    count_P1 = mask.sum(dim=1, keepdim=True)
    centred = (rewards - rewards.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)).masked_fill(~mask, 0.0)
    # Compared, not computed: the rounded mean of equal rewards may differ from each of them, and eps would blow that
    # up.
    highest = rewards.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    if normalize_std:
        variance = centred.square().sum(dim=1, keepdim=True) / (count_P1 - ddof).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    return centred.masked_fill(highest <= lowest, 0.0)
