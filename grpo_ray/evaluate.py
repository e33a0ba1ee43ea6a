"""Held-out accuracy, by the same samplers and the same reward functions as training.

pass@1 is the mean over k samples of each prompt (DeepSeek-R1, 2501.12948, section 3.1), k = `eval.num_samples`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_ray.config import RunConfig
from grpo_ray.errors import RewardError
from grpo_ray.roles import Sampler, Scorer
from grpo_ray.seeds import sample_seed
from grpo_ray.types import Prompt, SampleInfo, SampleRequest, SamplingParams, Score, ScoreRequest


@dataclass(frozen=True)
class EvalResult:
    accuracy: float
    """Mean over prompts of the mean over their samples."""
    standard_error: float
    """Of that mean, over prompts."""
    num_prompts: int
    num_samples: int
    """k."""
    mean_reward: float
    mean_length: float
    """Completion tokens."""


def eval_sampling(config: RunConfig) -> SamplingParams:
    return SamplingParams(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=0,
        min_p=0.0,
        max_tokens=config.rollout.max_completion_length,
        stop=config.rollout.stop,
    )


async def evaluate(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    scorer: Scorer,
    config: RunConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Sample and score every prompt `eval.num_samples` times.

    Raises:
        RewardError: a score failed. An accuracy with holes would be compared with one without.
    """
    params = eval_sampling(config)
    name = config.eval.accuracy or config.reward.functions[0].name
    total = len(prompts) * config.eval.num_samples
    done = 0

    async def one(prompt: Prompt, index: int) -> tuple[SampleInfo, Score]:
        nonlocal done
        seed = sample_seed(config.seed, prompt.id, index)
        info = await sampler.generate(SampleRequest(prompt.id, index, prompt.token_ids, seed, params))
        (score,) = await scorer.score([ScoreRequest(info, prompt.text, prompt.messages, prompt.columns)])
        if score.status.failed:
            raise RewardError(f"evaluation of prompt {prompt.id}: a reward failed ({score.status}): {score.detail}")
        done += 1
        progress(done, total)
        return info, score

    async with asyncio.TaskGroup() as tasks:
        per_prompt = [[tasks.create_task(one(p, i)) for i in range(config.eval.num_samples)] for p in prompts]
    results = [[t.result() for t in group] for group in per_prompt]
    rights = [sum(_right(s, name, config.eval.threshold) for _, s in group) / len(group) for group in results]
    mean = sum(rights) / len(rights)
    variance = sum((r - mean) ** 2 for r in rights) / max(1, len(rights) - 1)
    flat = [pair for group in results for pair in group]
    return EvalResult(
        accuracy=mean,
        standard_error=math.sqrt(variance / len(rights)),
        num_prompts=len(prompts),
        num_samples=config.eval.num_samples,
        mean_reward=sum(s.value for _, s in flat) / len(flat),
        mean_length=sum(i.num_tokens for i, _ in flat) / len(flat),
    )


def _right(score: Score, name: str, threshold: float) -> bool:
    part = next((p for p in score.parts if p.name == name), None)
    return part is not None and part.value >= threshold
