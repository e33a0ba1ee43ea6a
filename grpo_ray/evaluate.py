"""Held-out accuracy, by the same samplers and the same reward functions as training.

pass@1 is the mean over k samples of each prompt (DeepSeek-R1, 2501.12948, section 3.1), k = `eval.num_samples`; with more
than one, also pass@k and cons@k, the majority vote over their answers. See `grpo_ray.measures`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_ray.config import RunConfig
from grpo_ray.config_reward import RewardConfig, RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.events import EvalEvent
from grpo_ray.measures import Estimate, consensus, estimate, pass_at, pass_ks
from grpo_ray.roles import Sampler, Scorer
from grpo_ray.seeds import sample_seed
from grpo_ray.types import Prompt, SampleInfo, SampleRequest, SamplingParams, Score, ScoreRequest, ScoreStatus

MATH_VOTES = "grpo_ray.rewards.votes.math_votes"
TEXT_VOTES = "grpo_ray.rewards.votes.text_votes"


@dataclass(frozen=True)
class EvalResult:
    measures: dict[str, Estimate]
    """`pass@1`; with more than one sample also `pass@2`, `pass@4`, .. and, where votes were counted, `cons@k`."""
    num_prompts: int
    num_samples: int
    """k."""
    mean_reward: float
    mean_length: float
    """Completion tokens."""

    @property
    def accuracy(self) -> Estimate:
        """pass@1."""
        return self.measures["pass@1"]


@dataclass(frozen=True)
class _Answered:
    """One prompt with its k samples."""

    infos: list[SampleInfo]
    scores: list[Score]
    right: list[bool]
    votes: list[float | None] | None


def eval_sampling(config: RunConfig) -> SamplingParams:
    return SamplingParams(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=0,
        min_p=0.0,
        max_tokens=config.rollout.max_completion_length,
        stop=config.rollout.stop,
    )


def vote_config(config: RunConfig) -> RewardConfig | None:
    """The scorer that tells which answers are the same, for `evaluate`; None: with one sample there is no vote."""
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


def accuracy_name(config: RunConfig) -> str:
    """The reward function that says what is right."""
    return config.eval.accuracy or config.reward.functions[0].title


async def evaluate(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    scorer: Scorer,
    voter: Scorer | None,
    config: RunConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Sample and score every prompt `eval.num_samples` times.

    Args:
        voter: a scorer of `vote_config`. None: no cons@k.

    Raises:
        RewardError: a score or a vote failed. An accuracy with holes would be compared with one without.
    """
    params = eval_sampling(config)
    name = accuracy_name(config)
    total = len(prompts) * config.eval.num_samples
    done = 0

    async def one(prompt: Prompt, index: int) -> tuple[SampleInfo, Score]:
        nonlocal done
        seed = sample_seed(config.seed, prompt.id, index)
        info = await sampler.generate(SampleRequest(prompt.id, index, prompt.token_ids, seed, params))
        (score,) = await _score(scorer, prompt, [info])
        done += 1
        progress(done, total)
        return info, score

    async def all_of(prompt: Prompt) -> _Answered:
        async with asyncio.TaskGroup() as tasks:
            pairs = [tasks.create_task(one(prompt, i)) for i in range(config.eval.num_samples)]
        infos, scores = [p.result()[0] for p in pairs], [p.result()[1] for p in pairs]
        right = [_right(s, name, config.eval.threshold) for s in scores]
        votes = None if voter is None else [_vote(s) for s in await _score(voter, prompt, infos)]
        return _Answered(infos, scores, right, votes)

    async with asyncio.TaskGroup() as tasks:
        per_prompt = [tasks.create_task(all_of(p)) for p in prompts]
    answered = [t.result() for t in per_prompt]
    return EvalResult(
        measures=_measures(answered, config.eval.num_samples),
        num_prompts=len(prompts),
        num_samples=config.eval.num_samples,
        mean_reward=sum(s.value for a in answered for s in a.scores) / total,
        mean_length=sum(i.num_tokens for a in answered for i in a.infos) / total,
    )


def eval_event(step: int, name: str, result: EvalResult) -> EvalEvent:
    """What watchers are told of an evaluation; `name` of its set where there are several."""
    others = {measure: value for measure, value in result.measures.items() if measure != "pass@1"}
    num_samples = result.num_prompts * result.num_samples
    return EvalEvent(step, result.accuracy.mean, num_samples, result.accuracy.standard_error, name, others)


def _measures(answered: Sequence[_Answered], k: int) -> dict[str, Estimate]:
    out = {f"pass@{j}": estimate([pass_at(j, k, sum(a.right)) for a in answered]) for j in pass_ks(k)}
    votes = [(a.votes, a.right) for a in answered if a.votes is not None]
    if votes:
        out[f"cons@{k}"] = estimate([consensus(*pair) for pair in votes])
    return out


async def _score(scorer: Scorer, prompt: Prompt, infos: Sequence[SampleInfo]) -> list[Score]:
    scores = await scorer.score([ScoreRequest(i, prompt.text, prompt.messages, prompt.columns) for i in infos])
    failed = next((s for s in scores if s.status.failed), None)
    if failed is not None:
        raise RewardError(f"evaluation of prompt {prompt.id}: a reward failed ({failed.status}): {failed.detail}")
    return scores


def _right(score: Score, name: str, threshold: float) -> bool:
    part = next((p for p in score.parts if p.name == name), None)
    return part is not None and part.value >= threshold


def _vote(score: Score) -> float | None:
    return score.value if score.status is ScoreStatus.OK else None
