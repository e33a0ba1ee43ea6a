"""Offline generation: several scored samples of every prompt of a data set, in files from which a killed run resumes.

    prompts in order -> GroupRollout (sample, score) -> shard complete -> SampleFolder.write

A sample's seed depends on its prompt alone, so prompts that are sampled again after a kill get the same samples.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_ray.config.schema import RunConfig
from grpo_ray.data.prompts import PromptDataset
from grpo_ray.errors import LostSamplesError, PoisonedError, RewardError
from grpo_ray.health.applicable import why_not_applicable
from grpo_ray.loop.evaluate import eval_sampling
from grpo_ray.loop.group_rollout import GroupRollout
from grpo_ray.loop.requests import requests_of
from grpo_ray.loop.roles import Sampler, SampleStore, Scorer
from grpo_ray.run.rollout_log import distinct_refs
from grpo_ray.run.sample_files import About, LeftOut, SampledPrompt, SampleFolder
from grpo_ray.telemetry.measures import EvalResult
from grpo_ray.telemetry.sample_figures import Figures, figures_in
from grpo_ray.types import Group, SamplingParams, ScoreStatus

WAVES = 2
"""The number of samples in flight, as a multiple of what the engines sample at once: they never wait for the next prompt."""
TOLD = 500
"""The number of progress reports in a whole run."""
DRAWS = 5
"""The most attempts at sampling one file, while nodes die that hold its samples."""


@dataclass(frozen=True)
class SamplingReport:
    num_made: int
    """The number of samples made by this call."""
    num_before: int
    """The number of samples that existed before."""
    num_tokens: int
    """The number of completion tokens made by this call."""
    seconds: float
    """The duration of this call, with engines running."""
    left_out: tuple[LeftOut, ...]
    """The prompts of this call without samples."""
    num_unscored: int = 0
    """The number of samples of this call to which no reward applies."""
    why_unscored: str = ""
    """The reason for the first of them."""


def sampling_params(config: RunConfig) -> SamplingParams:
    sample = config.sample
    return replace(config.rollout.sampling_params, temperature=sample.temperature, top_p=sample.top_p)


def about_samples(config: RunConfig, prompts: PromptDataset, model: str, model_sha256: str) -> About:
    sample = config.sample
    return _about(
        config, prompts, model, model_sha256, sampling_params(config), sample.num_samples, sample.shard_prompts
    )


def about_answers(config: RunConfig, prompts: PromptDataset, model: str, model_sha256: str) -> About:
    """The metadata of an evaluation's answers, which are all in one file."""
    return _about(config, prompts, model, model_sha256, eval_sampling(config), config.eval.num_samples, len(prompts))


def _about(
    config: RunConfig,
    prompts: PromptDataset,
    model: str,
    model_sha256: str,
    params: SamplingParams,
    num_samples: int,
    shard_prompts: int,
) -> About:
    return About(
        model=model,
        model_sha256=model_sha256,
        prompts=prompts.fingerprint,
        num_prompts=len(prompts),
        num_samples=num_samples,
        shard_prompts=shard_prompts,
        seed=config.seed,
        sampling={
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "max_tokens": params.max_tokens,
            "stop": list(params.stop),
            **({"stop_token_ids": list(params.stop_token_ids)} if params.stop_token_ids else {}),
        },
        rewards=[f.model_dump(mode="json") for f in config.reward.functions],
    )


async def write_answers(
    path: Path, about: About, prompts: PromptDataset, result: EvalResult, samples: SampleStore
) -> Figures:
    """Write the samples of an evaluation to a folder, and return their figures."""
    k = about.num_samples
    refs = list({id(info.ref): info.ref for info in result.infos}.values())
    lists = {id(ref): rows for ref, rows in zip(refs, await samples.fetch(refs), strict=True)}
    drawn = [
        SampledPrompt(
            prompt,
            prompts.conversation(n),
            [lists[id(info.ref)][info.row] for info in result.infos[n * k : (n + 1) * k]],
            result.scores[n * k : (n + 1) * k],
        )
        for n, prompt in enumerate(prompts)
    ]
    await asyncio.to_thread(SampleFolder.open(path, about).write, 0, drawn)
    return await asyncio.to_thread(figures_in, path)


async def sample_all(
    prompts: PromptDataset,
    sampler: Sampler,
    scorer: Scorer,
    samples: SampleStore,
    folder: SampleFolder,
    config: RunConfig,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> SamplingReport:
    """Make the files that `folder` lacks. A prompt that crashes engines gets no samples and is named in its file.

    Raises:
        RewardError: the fraction of a file's samples that could not be scored is over `reward.on_failure.abort_above`.
        LostSamplesError: nodes died with the samples of one file, `DRAWS` times.
    """
    began = time.monotonic()
    missing = folder.missing()
    k = config.sample.num_samples
    total = len(prompts) * k
    done = total - k * sum(len(folder.about.shard(n)) for n in missing)
    num_before = folder.num_samples()
    made = tokens = 0
    unscored = 0
    why_unscored = ""
    left_out: list[LeftOut] = []
    step = max(k, total // TOLD)
    params = sampling_params(config)
    places = asyncio.Semaphore(max(1, WAVES * config.rollout.num_actors * config.rollout.max_num_seqs // k))
    progress(done, total)

    async def draw(index: int) -> Group | LeftOut:
        """Sample one prompt, whose slot is taken already: prompts start in order."""
        nonlocal done
        out: Group | LeftOut
        try:
            prompt = prompts.item(index, 0)
            out = group = Group(prompt, index, 0)
            requests = requests_of(prompt, range(k), config, params, group.dispatched_version)
            await GroupRollout(group, requests, sampler, scorer, at_once=config.reward.whole_groups)
        except PoisonedError as e:
            out = LeftOut(prompt.id, str(e))
        finally:
            places.release()
        done += k
        if done % step < k:
            progress(done, total)
        return out

    async def begin(number: int) -> list[asyncio.Task[Group | LeftOut]]:
        groups = []
        for index in folder.about.shard(number):
            await places.acquire()
            groups.append(tasks.create_task(draw(index)))
        return groups

    async def finish(number: int, groups: Sequence[asyncio.Task[Group | LeftOut]]) -> None:
        nonlocal made, tokens, unscored, why_unscored
        ended = [await group for group in groups]
        drawn = [one for one in ended if isinstance(one, Group)]
        without = [one for one in ended if isinstance(one, LeftOut)]
        _check_scores(drawn, config)
        refs = distinct_refs(drawn)
        lists = {id(ref): rows for ref, rows in zip(refs, await samples.fetch(refs), strict=True)}
        parts = [
            SampledPrompt(
                g.prompt, prompts.conversation(g.order), [lists[id(i.ref)][i.row] for i in g.samples], g.scores
            )
            for g in drawn
        ]
        await asyncio.to_thread(folder.write, number, parts, without)
        made += k * len(drawn)
        tokens += sum(info.num_sampled for group in drawn for info in group.samples)
        left_out.extend(without)
        for group in drawn:
            silent = sum(score.status is ScoreStatus.NOT_APPLICABLE for score in group.scores)
            unscored += silent
            if silent and not why_unscored:
                columns = group.prompt.columns
                why_unscored = "; ".join(why_not_applicable(f, columns, None) for f in config.reward.functions)

    async def make(number: int, groups: Sequence[asyncio.Task[Group | LeftOut]]) -> None:
        """Write one file; samples that were lost with their node are sampled again, and are the same."""
        nonlocal done
        for left in reversed(range(DRAWS)):
            try:
                await finish(number, groups)
                break
            except LostSamplesError:
                if not left:
                    raise
                done -= k * len(groups)
                groups = await begin(number)

    async with asyncio.TaskGroup() as tasks:
        for number in missing:
            tasks.create_task(make(number, await begin(number)))
    seconds = time.monotonic() - began
    return SamplingReport(made, num_before, tokens, seconds, tuple(left_out), unscored, why_unscored)


def _check_scores(groups: Sequence[Group], config: RunConfig) -> None:
    scores = [score for group in groups for score in group.scores]
    failed = [score for score in scores if score.status.failed]
    limit = config.reward.on_failure.abort_above
    if len(failed) > limit * len(scores):
        raise RewardError(
            f"{len(failed)} of {len(scores)} samples could not be scored, more than reward.on_failure.abort_above ({limit:g}) "
            f"allows; the first: {failed[0].status}, {failed[0].detail}"
        )
