"""The requests for the samples of one prompt."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_ray.config.schema import RunConfig
from grpo_ray.seeds import group_seed, sample_seed
from grpo_ray.types import EpisodeStart, Prompt, SampleRequest, SamplingParams, TrainerState


def requests_of(
    prompt: Prompt,
    indices: Iterable[int],
    config: RunConfig,
    params: SamplingParams,
    step: int | None = None,
    trainer: TrainerState | None = None,
) -> list[SampleRequest]:
    """A request for each of these samples of the prompt; with an environment, their episodes begin alike.

    Args:
        step: the last step done; None in an evaluation.
        trainer: how far training is; None: nothing is trained.
    """
    episode = None
    if config.environment is not None:
        episode = EpisodeStart(prompt, group_seed(config.seed, prompt.id), step, trainer)
    return [
        SampleRequest(prompt.id, i, prompt.token_ids, sample_seed(config.seed, prompt.id, i), params, episode)
        for i in indices
    ]
