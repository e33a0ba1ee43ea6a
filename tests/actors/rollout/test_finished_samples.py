"""What a rollout actor makes of vLLM's output, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.actor import RolloutActor
from actors.rollout.sample import sample_of
from grpo_ray.types import SampleInfo, SampleRequest, SamplingParams

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=8, stop=(), stop_token_ids=())


class Logprobs:
    """Of four tokens, one a position."""

    logprobs = (-0.1, -0.2, -0.3, -0.4)
    start_indices = (0, 1, 2, 3)

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("spans", "oldest"), [(((3, 0, 4),), 3), (((3, 0, 2), (5, 2, 4)), 3), (((7, 0, 1), (6, 1, 3), (8, 3, 4)), 6)]
)
def test_a_sample_is_as_old_as_its_oldest_token(spans: tuple[tuple[int, int, int], ...], oldest: int) -> None:
    """New weights may come in the middle of it."""
    actor: Any = object.__new__(RolloutActor)
    outcomes: list[Any] = []
    actor.name, actor.tokenizer, actor._add = "rollout-0", None, outcomes.append
    actor._samples, actor._num_tokens, actor._num_samples = [], 0, 0
    versions = [SimpleNamespace(version=str(v), start=a, end=b) for v, a, b in spans]
    completion = SimpleNamespace(
        routed_experts=None, finish_reason="stop", token_ids=[5, 6, 7, 8], weight_versions=versions, logprobs=Logprobs()
    )
    request = SampleRequest("p", 0, [1, 2], 9, PARAMS)
    actor._finish(1, sample_of(request, completion, None, "text", actor.name))
    info: SampleInfo = outcomes[0].info
    assert info.min_version == oldest
    assert [(s.version, s.start, s.end) for s in actor._samples[0].versions] == list(spans)
    assert actor._samples[0].logprobs.tolist() == pytest.approx(Logprobs.logprobs)
