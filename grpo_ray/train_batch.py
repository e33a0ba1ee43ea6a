"""Scored groups -> what is trained on. Pure; the shape of a batch is decided here, its place in time in the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_ray.advantages import group_advantages
from grpo_ray.config import AlgorithmConfig, RunConfig
from grpo_ray.types import Group, TrainBatch, TrainSample


def has_spread(group: Group) -> bool:
    """Do two of its rewards differ? DAPO 2503.14476, eq. 11 says so of right and wrong answers: 0 < right < G."""
    return len({s.value for s in group.scores if s.value == s.value}) > 1


def set_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Fill in `advantages`. A sample without a score has 0, and no part in its group's baseline.

    Under `gae` they are the rewards: the learner's critic makes advantages of them, one a token.
    """
    if algorithm.advantage == "gae":
        for group in groups:
            group.advantages = [s.value for s in group.scores]
        return
    rewards_PG = torch.tensor([[s.value for s in g.scores] for g in groups], dtype=torch.float64)
    advantages_PG = group_advantages(
        rewards_PG,
        mask_PG=~rewards_PG.isnan(),
        kind=algorithm.advantage,
        ddof=algorithm.std_ddof,
        eps=algorithm.std_eps,
    )
    for group, row in zip(groups, advantages_PG.tolist(), strict=True):
        group.advantages = row


def cut_batch(groups: Sequence[Group], step: int, config: RunConfig) -> TrainBatch:
    """The batch of this step. Nothing older than `max_staleness` may be in it.

    Samples without a score are masked from the loss; with `mask_truncated` those too that were cut at the longest
    completion (DAPO 2503.14476, section 3.4). As there and in TRL, these keep their part in the baseline.
    """
    bound = step - config.algorithm.max_staleness
    for g in groups:
        assert g.min_version >= bound, (
            f"group {g.prompt.id} holds tokens of version {g.min_version}, the bound is {bound}"
        )
    masked_reason = "length" if config.algorithm.mask_truncated else None
    samples = [
        TrainSample(
            ref=info.ref,
            row=info.row,
            prompt_id=info.prompt_id,
            index=info.index,
            num_prompt_tokens=info.num_prompt_tokens,
            num_tokens=info.num_tokens,
            advantage=advantage,
            group=number,
            loss_mask=score.value == score.value and info.finish_reason != masked_reason,
            part=g.part,
        )
        for number, g in enumerate(groups)
        for info, score, advantage in zip(g.samples, g.scores, g.advantages, strict=True)
    ]
    return TrainBatch(step=step, samples=samples, temperature=config.rollout.temperature)
