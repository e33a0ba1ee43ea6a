"""A step on episodes, over ranks and slices, is the step of a plain loop with a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.learner.group import LearnerGroup
from grpo_ray.batch.pack import sampled_tokens
from grpo_ray.types import Sample, TrainBatch, VersionSpan
from tests.actors.learner.test_learner import (
    LR,
    exported,
    make_batch,
    make_config,
    moved_apart,
    plain_logprobs,
    plain_model,
    run,
    start,
)

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300), pytest.mark.long]


def episodes() -> TrainBatch:
    """The batch of `make_batch` with the environment's tokens among the model's; the second sample has none of the model's."""
    batch, rng = make_batch(), np.random.default_rng(5)
    rows = []
    for place, sample in enumerate(batch.samples[0].ref):
        mine = rng.random(len(sample.token_ids)) < 0.5
        mine[rng.integers(len(mine))] = True
        spans = tuple(VersionSpan(0, t, t + 1) for t in np.flatnonzero(mine).tolist()) if place != 1 else ()
        logprobs = np.where(sampled_tokens(spans, len(mine)), sample.logprobs, np.float32(0))
        rows.append(replace(sample, versions=spans, logprobs=logprobs))
    samples = [
        replace(s, ref=rows, num_environment_tokens=s.num_tokens - rows[s.row].num_sampled) for s in batch.samples
    ]
    return replace(batch, samples=samples)


def masked_step(path: Path, batch: TrainBatch) -> tuple[dict[str, Tensor], float, float]:
    """The weights after one step, the norm of its gradient, and the mean |rollout - old|: sequence by sequence, with a mask."""
    model = plain_model(path)
    optimizer = torch.optim.AdamW(model.parameters(), LR, eps=1.0, weight_decay=0.0)
    members = [s for s in batch.samples if s.loss_mask and s.num_sampled]
    gaps = []
    for s in members:
        sample: Sample = s.ref[s.row]
        mask = torch.from_numpy(sampled_tokens(sample.versions, s.num_tokens))
        logp = plain_logprobs(model, sample)
        gaps.append((logp.detach() - torch.from_numpy(sample.logprobs))[mask].abs())
        ratio = (logp - logp.detach()).exp()
        per_token = -ratio * (s.advantage or 0.0) * mask
        (per_token.sum() / mask.sum() / len(members)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, norm.item(), torch.cat(gaps).mean().item()


@pytest.mark.parametrize(
    ("ranks", "stage", "learner"),
    [
        pytest.param(2, 2, {}, id="shared-prompts"),
        pytest.param(2, 3, {"sequence_parallel_size": 2}, id="slices"),
        pytest.param(1, 0, {"packing": False}, id="padded", marks=pytest.mark.slow),
        pytest.param(1, 1, {"forward": "plain"}, id="plain", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_episodes_is_that_of_a_loop_with_a_mask(
    ranks: int, stage: int, learner: dict[str, Any], tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    batch = episodes()
    want, want_norm, want_mismatch = masked_step(tiny_model, batch)
    group = start(make_config(tiny_model, ranks=ranks, stage=stage, learner=learner), tmp_path)
    groups.append(group)
    metrics = run(group.update(batch)).metrics
    assert metrics["grad_norm"] == pytest.approx(want_norm, rel=1e-5)
    assert metrics["mismatch/mean_abs"] == pytest.approx(want_mismatch, rel=1e-5)
    trained = [s for s in batch.samples if s.loss_mask and s.num_sampled]
    assert metrics["tokens/trained"] == sum(s.num_sampled for s in trained) < sum(s.num_tokens for s in trained)
    origin = load_file(tiny_model / "model.safetensors")
    assert moved_apart(exported(group, tmp_path / "hf"), want, origin) < 1e-5
