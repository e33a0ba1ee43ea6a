"""Episodes in a micro-batch: what the environment wrote between a policy's tokens is an input and never a target."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_ray.batch.pack import PackItem, pack, sampled_tokens, tokens_of_version
from grpo_ray.batch.sequence import slice_of
from grpo_ray.types import VersionSpan

SPANS = (VersionSpan(3, 1, 3), VersionSpan(4, 5, 6))
"""Of seven completion tokens, 1 and 2 were sampled by version 3, and 5 by version 4."""


def episode(prompt: list[int], completion: list[int], sampled: list[int], sample: int = 0) -> PackItem:
    """Token t has the log-probability -t, the advantage t + 0.5, and is current where t is odd."""
    places = np.arange(len(completion))
    return PackItem(
        np.array(prompt),
        np.array(completion),
        -places.astype(np.float32),
        places + 0.5,
        0.25,
        sample,
        current=places % 2 == 1,
        sampled=np.isin(places, sampled),
    )


def test_what_no_version_covers_was_not_sampled() -> None:
    assert sampled_tokens(SPANS, 7).tolist() == [False, True, True, False, False, True, False]
    assert tokens_of_version(SPANS, 3, 7).tolist() == [False, True, True, False, False, False, False]
    assert not sampled_tokens((), 2).any()


def test_sampled_tokens_alone_are_targets_and_the_rest_is_input_up_to_the_last_target() -> None:
    p = pack([episode([1, 2], [10, 11, 12, 13, 14, 15, 16], [1, 2, 5])])
    assert p.input_ids.tolist() == [1, 2, 10, 11, 12, 13, 14]
    assert p.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert p.target_rows.tolist() == [2, 3, 6]
    assert p.targets.tolist() == [11, 12, 15]
    assert p.rollout_logprobs.tolist() == [-1, -2, -5]
    assert p.advantages.tolist() == [1.5, 2.5, 5.5]
    assert p.current.tolist() == [True, False, True]
    assert p.weights.tolist() == [0.25] * 3
    assert (p.samples.tolist(), p.segments.tolist()) == ([0] * 3, [0] * 3)
    assert p.num_tokens == 7


def test_episodes_share_a_prompt_and_are_padded_like_answers() -> None:
    items = [episode([1, 2], [3, 4, 5, 6], [0, 3]), episode([1, 2], [7, 8], [0], 1), episode([1, 2], [9, 3], [1], 2)]
    apart, shared, padded = pack(items), pack(items, share_prompts=True), pack(items, padded=True)
    assert shared.input_ids.tolist() == [1, 2, 3, 4, 5, 9]
    assert shared.sequences == [(0, 1), (0,), (0, 2)]
    assert shared.target_rows.tolist() == [1, 4, 1, 5]
    assert padded.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 0, 0, 0, 1, 2, 9, 0, 0]
    assert padded.target_rows.tolist() == [1, 4, 6, 12]
    for name in ("targets", "samples", "segments", "advantages", "rollout_logprobs", "weights", "current"):
        for other in (shared, padded):
            assert getattr(other, name).tolist() == getattr(apart, name).tolist(), name
    assert apart.targets.tolist() == [3, 6, 7, 3]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_slices_have_every_target_of_an_episode_once_and_some_slices_none(size: int) -> None:
    batch = pack([episode([1, 2], list(range(10, 20)), [0, 8, 9]), episode([3], [4, 5, 6, 7], [3], 1)])
    slices = [slice_of(batch, rank, size) for rank in range(size)]
    assert np.concatenate([s.targets for s in slices]).tolist() == [10, 18, 19, 7]
    assert np.concatenate([s.input_ids[s.target_rows] for s in slices]).tolist() == [2, 17, 18, 6]
    assert slices[0].counts == tuple(len(s.targets) for s in slices)
    assert size < 5 or 0 in slices[0].counts
