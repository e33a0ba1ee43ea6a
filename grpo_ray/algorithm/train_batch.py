"""Training batches from scored groups. Pure; this module decides the content of a batch, the loop its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.algorithm.advantages import group_advantages, process_advantages
from grpo_ray.algorithm.users_called import advantage_of
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.types import TRUNCATED, Group, Step, TrainBatch, TrainSample, Truncation

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def set_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Fill in `advantages`, and `steps` under `process`. A sample without a score has 0, and no part in its group's baseline.

    Where the learner computes the advantages, since only it has their inputs, they stay empty.
    """
    if algorithm.advantages_on_learner:
        return
    if algorithm.advantage == "process":
        for group in groups:
            _set_process_advantages(group, algorithm)
        return
    rewards_PG = torch.tensor([[s.value for s in g.scores] for g in groups], dtype=torch.float64)
    for group, row in zip(groups, _compare(rewards_PG, ~rewards_PG.isnan(), algorithm).tolist(), strict=True):
        group.advantages = row


def _set_process_advantages(group: Group, algorithm: AlgorithmConfig) -> None:
    group.advantages = [0.0] * len(group.scores)
    group.steps = [()] * len(group.scores)
    # An empty completion has a part in the baseline, as if it were one token long.
    lengths = [max(info.num_tokens, 1) for info in group.samples]
    steps = {
        i: score.steps or (Step(lengths[i] - 1, score.value),)
        for i, score in enumerate(group.scores)
        if score.value == score.value
    }
    if not steps:
        return
    advantages = process_advantages(
        [torch.tensor([s.value for s in own], dtype=torch.float64) for own in steps.values()],
        [torch.tensor([s.end for s in own]) for own in steps.values()],
        [lengths[i] for i in steps],
        ddof=algorithm.std_ddof,
        eps=algorithm.std_eps,
    )
    for (i, own), advantages_T in zip(steps.items(), advantages, strict=True):
        group.steps[i] = tuple(Step(s.end, float(advantages_T[s.end])) for s in own)
        group.advantages[i] = float(advantages_T.mean())


def penalised_advantages(
    samples: Sequence[TrainSample], penalties_S: Float[Tensor, "S"], algorithm: AlgorithmConfig
) -> Float[Tensor, "S"]:
    """The group advantages of penalised rewards, RLOO 2402.14740.

    Args:
        samples: [S], a whole batch; one without a reward (NaN) has no part in the baseline.
        penalties_S: [S] float64, beta x KL.
        algorithm: the options of the advantage.

    Returns:
        [S] float64.
    """
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(i)
    size = max(map(len, groups.values()))
    places_PG = torch.tensor([[*members, *[-1] * (size - len(members))] for members in groups.values()])
    scores_S = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    # Masked by the scores alone: a non-finite KL must not pass for a missing score.
    mask_PG = (places_PG >= 0) & ~scores_S[places_PG].isnan()
    advantages_PG = _compare((scores_S - penalties_S)[places_PG], mask_PG, algorithm)
    out_S = torch.zeros_like(scores_S)
    out_S[places_PG[places_PG >= 0]] = advantages_PG[places_PG >= 0]
    return out_S


def _compare(
    rewards_PG: Float[Tensor, "P G"], mask_PG: Bool[Tensor, "P G"], algorithm: AlgorithmConfig
) -> Float[Tensor, "P G"]:
    return group_advantages(
        rewards_PG, mask_PG=mask_PG, kind=advantage_of(algorithm), ddof=algorithm.std_ddof, eps=algorithm.std_eps
    )


def cut_batch(groups: Sequence[Group], step: int, config: RunConfig) -> TrainBatch:
    """Build the batch of the step with this number. Nothing older than `max_staleness` may be in it.

    Samples without a score are masked from the loss; with `mask_truncated` also those that had no room for more tokens (DAPO
    2503.14476, section 3.4). As there and in TRL, these keep their part in the baseline.
    """
    bound = step - 1 - config.algorithm.max_staleness
    for g in groups:
        assert g.min_version >= bound, (
            f"group {g.prompt.id} holds tokens of version {g.min_version}, the bound is {bound}"
        )
    masked_reasons = TRUNCATED if config.algorithm.mask_truncated else frozenset()
    samples = [
        TrainSample(
            ref=info.ref,
            row=info.row,
            prompt_id=info.prompt_id,
            index=info.index,
            num_prompt_tokens=info.num_prompt_tokens,
            num_tokens=info.num_tokens,
            num_environment_tokens=info.num_environment_tokens,
            group=number,
            loss_mask=score.value == score.value and info.finish_reason not in masked_reasons,
            reward=score.value,
            advantage=advantage,
            part=g.part,
            steps=steps,
        )
        for number, g in enumerate(groups)
        for info, score, advantage, steps in zip(g.samples, g.scores, _advantages(g), _steps(g), strict=True)
    ]
    r = config.rollout
    return TrainBatch(step, samples, r.temperature, Truncation(r.top_p, r.top_k, r.min_p))


def _advantages(group: Group) -> Sequence[float | None]:
    return group.advantages or [None] * len(group.samples)


def _steps(group: Group) -> Sequence[tuple[Step, ...]]:
    return group.steps or [()] * len(group.samples)
