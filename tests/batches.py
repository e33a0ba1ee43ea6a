"""What the loop would cut from groups that a test has made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo_ray.types import Group, TrainBatch, TrainSample


def batch_of(groups: Sequence[Group], step: int, temperature: float = 1.0) -> TrainBatch:
    """Of the step after `step`."""
    samples = [
        TrainSample(
            info.ref,
            info.row,
            info.prompt_id,
            info.index,
            info.num_prompt_tokens,
            info.num_tokens,
            number,
            loss_mask=not math.isnan(score.value),
            reward=score.value,
            advantage=advantage,
            steps=steps,
        )
        for number, g in enumerate(groups)
        for info, score, advantage, steps in zip(
            g.samples, g.scores, g.advantages, g.steps or [()] * len(g.samples), strict=True
        )
    ]
    return TrainBatch(step + 1, samples, temperature)
