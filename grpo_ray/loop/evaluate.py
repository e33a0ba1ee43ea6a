"""Held-out accuracy, measured with the same rollout engines and the same reward functions as training.

pass@1 is the mean over k samples of each prompt (DeepSeek-R1, 2501.12948, section 3.1), k = `eval.num_samples`; with more
than one, also pass@k and cons@k, the majority vote over their answers. See `grpo_ray.telemetry.measures`.

A sample to which the accuracy does not apply (None, or a row of other `sources`) is neither right nor wrong: it is left out of
every measure, and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import fsum

from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import RewardError
from grpo_ray.health.applicable import why_not_applicable
from grpo_ray.loop.requests import requests_of
from grpo_ray.loop.roles import Sampler, Scorer
from grpo_ray.telemetry.events import EvalEvent
from grpo_ray.telemetry.measures import Estimate, EvalResult, accuracy_name, consensus, estimate, pass_at, pass_ks
from grpo_ray.types import (
    Prompt,
    SampleInfo,
    SamplingParams,
    Score,
    ScoreRequest,
    ScoreStatus,
    TrainerState,
)

MATH_VOTES = "grpo_ray.rewards.votes.math_votes"
TEXT_VOTES = "grpo_ray.rewards.votes.text_votes"


@dataclass(frozen=True)
class _Answered:
    """One prompt with its k samples."""

    infos: list[SampleInfo]
    scores: list[Score]
    right: list[bool | None]
    """Whether each sample is right; None where the accuracy does not apply."""
    votes: list[float | None] | None


def eval_sampling(config: RunConfig) -> SamplingParams:
    params = config.rollout.sampling_params
    return replace(params, temperature=config.eval.temperature, top_p=config.eval.top_p, top_k=0, min_p=0.0)


def vote_config(config: RunConfig) -> RewardConfig | None:
    """The config of the scorer that decides which answers are the same, for `evaluate`; None with one sample, where there is no
    vote."""
    if config.eval.num_samples == 1 or config.data.eval is None:
        return None
    votes = MATH_VOTES if accuracy_name(config) == "accuracy" else TEXT_VOTES
    changes = {
        "functions": (RewardFunctionConfig(name=votes),),
        "unit": "group",
        "num_actors": 1,
        "num_cpus": 0,
        "resources": {},
    }
    return config.reward.model_copy(update=changes)


async def evaluate(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    scorer: Scorer,
    voter: Scorer | None,
    config: RunConfig,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    trainer: TrainerState | None = None,
) -> EvalResult:
    """Sample and score every prompt `eval.num_samples` times.

    Args:
        voter: a scorer made with `vote_config`. None: no cons@k.
        trainer: how far training is, for reward functions. None: nothing is trained.

    Raises:
        RewardError: a score or a vote failed; an accuracy with missing scores would be compared with a complete one.
    """
    params = eval_sampling(config)
    name = accuracy_name(config)
    total = len(prompts) * config.eval.num_samples
    done = 0

    async def draw(prompt: Prompt, indices: Sequence[int]) -> list[tuple[SampleInfo, Score]]:
        nonlocal done
        requests = requests_of(prompt, indices, config, params, None, trainer)
        infos = list(await asyncio.gather(*(sampler.generate(r) for r in requests)))
        scores = await _score(scorer, prompt, infos, trainer)
        done += len(infos)
        progress(done, total)
        return list(zip(infos, scores, strict=True))

    async def all_of(prompt: Prompt) -> _Answered:
        every = range(config.eval.num_samples)
        units = [every] if config.reward.whole_groups else [[i] for i in every]
        async with asyncio.TaskGroup() as tasks:
            drawn = [tasks.create_task(draw(prompt, unit)) for unit in units]
        pairs = [pair for task in drawn for pair in task.result()]
        infos, scores = [info for info, _ in pairs], [score for _, score in pairs]
        right = [_right(s, name, config.eval.threshold) for s in scores]
        votes = None if voter is None else [_vote(s) for s in await _score(voter, prompt, infos)]
        return _Answered(infos, scores, right, votes)

    async with asyncio.TaskGroup() as tasks:
        per_prompt = [tasks.create_task(all_of(p)) for p in prompts]
    answered = [t.result() for t in per_prompt]
    rewards = [s.value for a in answered for s in a.scores if s.status is ScoreStatus.OK]
    silent = next((p for p, a in zip(prompts, answered, strict=True) if None in a.right), None)
    function = next((f for f in config.reward.functions if f.title == name), None)
    return EvalResult(
        measures=_measures(answered, config.eval.num_samples),
        num_prompts=len(prompts),
        num_samples=config.eval.num_samples,
        mean_reward=fsum(rewards) / len(rewards) if rewards else None,
        mean_length=sum(i.num_sampled for a in answered for i in a.infos) / total,
        num_not_applicable=sum(a.right.count(None) for a in answered),
        why_not=_why_not(function, name, silent),
        scores=tuple(s for a in answered for s in a.scores),
        infos=tuple(i for a in answered for i in a.infos),
    )


def _why_not(function: RewardFunctionConfig | None, name: str, silent: Prompt | None) -> str:
    """Why the accuracy does not apply to a prompt; empty where it applies to all."""
    if silent is None:
        return ""
    if function is None:
        return f"the environment {name!r} gave no reward"
    return why_not_applicable(function, silent.columns, None)


def eval_event(step: int, name: str, result: EvalResult) -> EvalEvent:
    """The event that reports an evaluation; `name` is that of its data set where there are several."""
    others = {measure: value for measure, value in result.measures.items() if measure != "pass@1"}
    accuracy = result.accuracy
    mean, error = (None, 0.0) if accuracy is None else (accuracy.mean, accuracy.standard_error)
    return EvalEvent(step, mean, result.num_measured, error, name, others, result.num_not_applicable)


def _measures(answered: Sequence[_Answered], k: int) -> dict[str, Estimate]:
    out = {}
    applying = [[right for right in a.right if right is not None] for a in answered]
    for j in pass_ks(k):
        if chances := [pass_at(j, len(right), sum(right)) for right in applying if len(right) >= j]:
            out[f"pass@{j}"] = estimate(chances)
    if majorities := [consensus(*votes) for a in answered if (votes := _votes_that_count(a))]:
        out[f"cons@{k}"] = estimate(majorities)
    return out


def _votes_that_count(answered: _Answered) -> tuple[list[float | None], list[bool]] | None:
    """The votes of the samples to which the accuracy applies, and whether each is right; None without such samples or votes."""
    if answered.votes is None:
        return None
    pairs = [(v, right) for v, right in zip(answered.votes, answered.right, strict=True) if right is not None]
    return ([v for v, _ in pairs], [right for _, right in pairs]) if pairs else None


async def _score(
    scorer: Scorer, prompt: Prompt, infos: Sequence[SampleInfo], trainer: TrainerState | None = None
) -> list[Score]:
    scores = await scorer.score([ScoreRequest.of(info, prompt, None, trainer) for info in infos])
    failed = next((s for s in scores if s.status.failed), None)
    if failed is not None:
        raise RewardError(f"evaluation of prompt {prompt.id}: a reward failed ({failed.status}): {failed.detail}")
    return scores


def _right(score: Score, name: str, threshold: float) -> bool | None:
    part = next((p for p in score.parts if p.name == name), None)
    return part.value >= threshold if part is not None and part.status is ScoreStatus.OK else None


def _vote(score: Score) -> float | None:
    return score.value if score.status is ScoreStatus.OK else None
