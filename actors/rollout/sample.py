"""The conversion of vLLM's output for one request to a `Sample`, and to the `SampleInfo` that describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.errors import WorkerError
from grpo_ray.types import EpisodeFigures, Sample, SampleInfo, SampleRequest, VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


def sample_of(
    request: SampleRequest, completion: CompletionOutput, adapter_version: int | None, text: str, worker: str
) -> Sample:
    """The completion as a sample of this request.

    Args:
        adapter_version: the version of the LoRA adapter that it was sampled with; None: vLLM reports the version of each token.
        text: the completion as rewards read it.
        worker: the engine's name, for errors.

    Raises:
        WorkerError: a log-probability is missing or not finite, or the experts of tokens are not known.
    """
    num_tokens = len(completion.token_ids)
    if adapter_version is not None:
        versions: tuple[VersionSpan, ...] = (VersionSpan(adapter_version, 0, num_tokens),)
    else:
        versions = tuple(VersionSpan(int(s.version), s.start, s.end) for s in completion.weight_versions or ())
    return Sample(
        prompt_id=request.prompt_id,
        index=request.index,
        prompt_token_ids=np.asarray(request.prompt_token_ids, dtype=np.int32),
        token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=_sampled_logprobs(completion.logprobs, num_tokens, worker),
        versions=versions,
        finish_reason=completion.finish_reason,
        text=text,
        routes=_routes(completion.routed_experts, len(request.prompt_token_ids) + num_tokens - 1, worker),
    )


def info_of(sample: Sample, worker: str, row: int, episode: EpisodeFigures | None = None) -> SampleInfo:
    """What the controller learns of a sample.

    Args:
        row: its index in the list that it travels in.
        episode: figures of its episode.
    """
    return SampleInfo(
        prompt_id=sample.prompt_id,
        index=sample.index,
        num_prompt_tokens=len(sample.prompt_token_ids),
        num_tokens=len(sample.token_ids),
        min_version=sample.min_version,
        finish_reason=sample.finish_reason,
        worker=worker,
        ref=None,
        row=row,
        num_environment_tokens=len(sample.token_ids) - sample.num_sampled,
        episode=episode,
    )


def _routes(routes: NDArray[np.integer] | None, needed: int, name: str) -> NDArray[np.integer] | None:
    """The experts of the tokens that were inputs; a sample that ends at a text may have been sampled further."""
    if routes is None:
        return None
    if len(routes) < needed:
        raise WorkerError(
            f"{name}: vLLM told the experts of {len(routes)} tokens of {needed}; leave out rollout.keep_routing"
        )
    return np.ascontiguousarray(routes[:needed])


def _sampled_logprobs(logprobs: Any, num_tokens: int, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[T] the log-probabilities of the sampled tokens, which vLLM puts first at each position."""
    if len(logprobs) != num_tokens:
        raise WorkerError(f"{name}: vLLM gave {len(logprobs)} log-probabilities for {num_tokens} tokens")
    flat = np.asarray(logprobs.logprobs, dtype=np.float32)
    sampled = flat[np.asarray(logprobs.start_indices, dtype=np.int64)]
    if not np.isfinite(sampled).all():
        place = int(np.isfinite(sampled).argmin())
        raise WorkerError(
            f"{name}: vLLM gave {sampled[place]} as the log-probability of token {place} that it sampled; its weights or its "
            "arithmetic are broken: use model.dtype float32, or lower learner.learning_rate if it began with a sync"
        )
    return sampled
