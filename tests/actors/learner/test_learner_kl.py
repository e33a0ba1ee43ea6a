"""A KL in the reward, and advantages of tokens, through real DeepSpeed ranks against plain PyTorch, sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.learner.group import LearnerGroup
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.errors import NonFiniteError
from grpo_ray.types import Step, TrainBatch, TrainSample
from tests.actors.learner.test_invariance import choose
from tests.actors.learner.test_learner import (
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
BETA = 3.0
LR = 0.3


def scored_batch(step: int) -> TrainBatch:
    """Four groups of three. The last sample has no score; one of the second group was truncated and is masked from the loss."""
    batch = make_batch(step=step, seed=step)
    samples = list(batch.samples)
    samples[-1] = replace(samples[-1], reward=math.nan)
    samples[4] = replace(samples[4], loss_mask=False)
    return replace(batch, samples=samples)


def rloo(samples: list[TrainSample], rewards: list[float]) -> list[float]:
    out = []
    for one, reward in zip(samples, rewards, strict=True):
        pairs = zip(samples, rewards, strict=True)
        others = [r for s, r in pairs if s.group == one.group and s.index != one.index]
        out.append(reward - sum(others) / len(others))
    return out


def plain_rloo(
    path: Path, batches: list[TrainBatch], beta: float = BETA
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """RLOO 2402.14740 with the loss of DAPO in two mini-batches: the metrics of each step, and the weights after all."""
    model, reference = plain_model(path), plain_model(path)
    optimizer = torch.optim.AdamW(model.parameters(), LR, eps=1.0, weight_decay=0.0)
    out = []
    for batch in batches:
        scored = [s for s in batch.samples if s.reward == s.reward]
        with torch.no_grad():
            old = [plain_logprobs(model, s.ref[s.row]) for s in scored]
            kls = [
                (o - plain_logprobs(reference, s.ref[s.row])).double().sum().item()
                for o, s in zip(old, scored, strict=True)
            ]
        advantages = rloo(scored, [s.reward - beta * kl for s, kl in zip(scored, kls, strict=True)])
        norms = []
        for half in ((0, 1), (2, 3)):
            chosen = [k for k, s in enumerate(scored) if s.loss_mask and s.group in half]
            tokens = sum(scored[k].num_tokens for k in chosen)
            optimizer.zero_grad()
            for k in chosen:
                ratio = (plain_logprobs(model, scored[k].ref[scored[k].row]) - old[k]).exp()
                bounded = ratio.clamp(0.8, 1.2)
                (-torch.min(ratio * advantages[k], bounded * advantages[k]).sum() / tokens).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6).item())
            optimizer.step()
        out.append(
            {
                "kl/ref": sum(kls) / sum(s.num_tokens for s in scored),
                "reward/kl_penalty": beta * sum(kls) / len(scored),
                "grad_norm": float(np.mean(norms)),
                "tokens/trained": float(sum(s.num_tokens for s in scored if s.loss_mask)),
            }
        )
    return out, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "stage", "budget"),
    [
        pytest.param(1, 1, 1000, id="all-in-one-micro-batch"),
        pytest.param(2, 3, 60, id="zero-3-one-sequence-a-micro-batch"),
        pytest.param(4, 2, 100, id="four-ranks", marks=pytest.mark.slow),
        pytest.param(2, 0, 400, id="no-zero", marks=pytest.mark.slow),
    ],
)
def test_the_kl_comes_off_the_rewards_of_the_whole_batch(
    ranks: int, stage: int, budget: int, tiny_model: Path, tmp_path: Path
) -> None:
    algorithm = {"preset": "rloo", "loss": "dapo", "beta": BETA, "kl_in": "reward", "num_mini_batches": 2}
    learner = {"micro_batch_tokens": budget, "learning_rate": LR}
    config = make_config(tiny_model, ranks=ranks, stage=stage, algorithm=algorithm, learner=learner)
    batches = [scored_batch(step) for step in range(3)]
    want, weights = plain_rloo(tiny_model, batches)
    without, _ = plain_rloo(tiny_model, batches, beta=0.0)
    assert abs(want[2]["grad_norm"] / without[2]["grad_norm"] - 1) > 0.01
    assert abs(want[2]["reward/kl_penalty"]) > 0.01, "k1 may be negative"
    group = start(config, tmp_path)
    try:
        for batch, plain in zip(batches, want, strict=True):
            got = run(group.update(batch)).metrics
            for name, value in plain.items():
                assert got[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
            assert got["ratio/mean"] != 1
            assert "loss/kl" not in got
        origin = load_file(tiny_model / "model.safetensors")
        assert moved_apart(exported(group, tmp_path / "hf"), weights, origin) < 1e-4
        if ranks == 2:
            assert_the_samplers_report_can_be_old_and_a_kl_that_is_no_number_is_named(group, tiny_model, tmp_path)
            assert_tokens_have_the_advantages_of_their_steps(group, tmp_path)
    finally:
        run(group.close())


def assert_the_samplers_report_can_be_old_and_a_kl_that_is_no_number_is_named(
    group: LearnerGroup, tiny_model: Path, tmp_path: Path
) -> None:
    values = {"advantage": "rloo", "beta": BETA, "kl_in": "reward", "kl_estimator": "k2", "old_logprobs": "rollout"}
    choose(group, AlgorithmConfig.model_validate(values))
    batch, reference = scored_batch(4), plain_model(tiny_model)
    scored = [s for s in batch.samples if s.reward == s.reward]
    with torch.no_grad():
        d = [torch.from_numpy(s.ref[s.row].logprobs) - plain_logprobs(reference, s.ref[s.row]) for s in scored]
    got = run(group.update(batch)).metrics
    assert got["kl/ref"] == pytest.approx((torch.cat(d).square() / 2).mean().item(), rel=1e-5)
    before = exported(group, tmp_path / "before")
    bad = scored[5]
    bad.ref[bad.row].logprobs[0] = -np.inf
    with pytest.raises(NonFiniteError, match=rf"step 5: the KL of sample {bad.prompt_id}\[{bad.index}\]"):
        run(group.update(batch))
    after = exported(group, tmp_path / "after")
    assert all(torch.equal(before[n], after[n]) for n in before)


def assert_tokens_have_the_advantages_of_their_steps(group: LearnerGroup, tmp_path: Path) -> None:
    choose(group, AlgorithmConfig(advantage="process"))
    rng = np.random.default_rng(5)
    batch = make_batch(seed=5)
    samples, wanted = [], []
    for number, s in enumerate(batch.samples):
        ends = sorted({int(rng.integers(s.num_tokens)), s.num_tokens - 1 - number % 2} - {-1})
        # The mean, which is for people, must not decide anything. One sample has no signal, and costs no pass.
        values = [0.0 if number == 3 else float(rng.normal()) for _ in ends]
        samples.append(replace(s, advantage=float(number == 3), steps=tuple(map(Step, ends, values))))
        pairs = list(zip(ends, values, strict=True))
        wanted.append([next((v for end, v in pairs if t <= end), 0.0) for t in range(s.num_tokens)])
    model = plain_model(tmp_path / "after")
    members = [k for k, s in enumerate(samples) if s.loss_mask]
    for k in members:
        logp = plain_logprobs(model, samples[k].ref[samples[k].row])
        (-((logp - logp.detach()).exp() * torch.tensor(wanted[k])).mean() / len(members)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6).item()
    got = run(group.update(replace(batch, samples=samples))).metrics
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert got["tokens/trained"] == sum(samples[k].num_tokens for k in members if k != 3)
