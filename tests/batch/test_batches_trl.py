"""Advantages, weights for the sampler, overlong filtering and RLOO's KL in the reward against TRL's own
`_generate_and_score_completions`, called for real on a trainer without a model: samples, scores and log-probabilities are
handed to it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from grpo_ray.algorithm.advantages import group_advantages
from grpo_ray.algorithm.losses.correction import CorrectionOptions, correction_weights
from grpo_ray.algorithm.losses.kl import kl_of_tokens
from grpo_ray.algorithm.train_batch import penalised_advantages
from grpo_ray.batch.segments import Segments
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.types import TrainSample
from tests.naive_losses import Batch, make_batch

GROUP = 4
PAD, EOS = 0, 1


def trl_batch(rewards: Tensor, b: Batch, **settings: Any) -> dict[str, Tensor]:
    """What TRL's loss would be given. `settings`: attributes of its trainer."""
    trainer: Any = object.__new__(GRPOTrainer)
    trainer.args = SimpleNamespace(
        per_device_train_batch_size=len(rewards),
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
    )
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x)
    vars(trainer).update(
        environment_factories=None,
        pad_to_multiple_of=None,
        vllm_importance_sampling_clip_min=None,
        tools=[],
        environments=[],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        eos_token_ids=[EOS],
        beta=0.0,
        num_iterations=1,
        num_generations=GROUP,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        mask_truncated_completions=False,
        log_multimodal=False,
        _is_vlm=False,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["reward"],
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    # The last token of every other sample is not the end of the sequence: that one was truncated.
    ids = [[7] * (n - 1) + [EOS if i % 2 else 7] for i, n in enumerate(b.lengths)]
    rollout = [r.tolist() for r in b.rollout]
    longest = max(b.lengths)
    old = torch.stack([torch.cat([r, r.new_zeros(longest - len(r))]) for r in b.old])
    vars(trainer).update(
        _generate=lambda _: ([[5]] * len(ids), ids, None, ["text"] * len(ids), rollout, {}, None, None),
        _calculate_rewards=lambda *_: rewards[:, None],
        _get_per_token_logps_and_entropies=lambda *_, **__: (old, None, None),
    )
    for name, value in settings.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "?"} for _ in ids])


def batch(seed: int) -> Batch:
    """TRL keeps the sampler's report in fp32."""
    b = make_batch(seed, num=3 * GROUP)
    return replace(b, rollout=[r.float().double() for r in b.rollout])


def rewards_of(seed: int) -> Tensor:
    """Some without a score."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(3 * GROUP, generator=g, dtype=torch.float64)
    return rewards.masked_fill(torch.rand(3 * GROUP, generator=g) < 0.15, math.nan)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kind", "scale"), [("grpo", "group"), ("dr_grpo", "none"), ("batch_std", "batch")])
def test_advantages_are_trls(kind: str, scale: str, seed: int) -> None:
    rewards = rewards_of(seed)
    theirs = trl_batch(rewards, batch(seed), scale_rewards=scale)["advantages"]
    rewards_PG = rewards.reshape(-1, GROUP)
    defaults = AlgorithmConfig(advantage=kind)
    ours = group_advantages(
        rewards_PG, kind=kind, ddof=defaults.std_ddof, eps=defaults.std_eps, mask_PG=~rewards_PG.isnan()
    )
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("token_truncate", None, 2.0),
        ("token_truncate", 0.5, 1.5),
        ("token_mask", 0.5, 5.0),
        ("sequence_truncate", None, 3.0),
        ("sequence_mask", None, 3.0),
        ("sequence_mask", 0.5, 2.0),
    ],
)
def test_the_weights_for_the_sampler_are_trls(mode: str, low: float | None, high: float) -> None:
    for seed in range(6):
        b = batch(seed)
        theirs = trl_batch(
            rewards_of(seed),
            b,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        )["importance_sampling_ratio"]
        index = torch.repeat_interleave(torch.arange(len(b.lengths)), torch.tensor(b.lengths))
        old, rollout, zeros = torch.cat(b.old), torch.cat(b.rollout), torch.zeros(sum(b.lengths)).double()
        options = CorrectionOptions(mode, low or 0.0, high, geometric_mask=None, off_policy_mask_threshold=None)
        ours = correction_weights(old, old, rollout, zeros, Segments.of(index), options)
        theirs = theirs.expand(-1, max(b.lengths))
        flat = torch.cat([row[:n] for row, n in zip(theirs, b.lengths, strict=True)])
        torch.testing.assert_close(ours, flat, rtol=1e-6, atol=1e-12)


def test_truncated_samples_stay_in_trls_baseline_too() -> None:
    rewards, b = rewards_of(0), batch(0)
    plain, masked = (trl_batch(rewards, b, mask_truncated_completions=on) for on in (False, True))
    torch.testing.assert_close(plain["advantages"], masked["advantages"])
    kept = torch.tensor([n if i % 2 else 0 for i, n in enumerate(b.lengths)])
    assert masked["completion_mask"].sum(dim=1).tolist() == kept.tolist()
    assert masked["num_items_in_batch"] == kept.sum()


def trl_rloo(rewards: Tensor, b: Batch, beta: float) -> tuple[Tensor, float]:
    """Advantages of TRL's RLOOTrainer, and its mean KL."""
    trainer: Any = object.__new__(RLOOTrainer)
    trainer.args = SimpleNamespace(per_device_train_batch_size=len(rewards), gradient_checkpointing_kwargs=None)
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, gather=lambda x: x, reduce=lambda x, **_: x
    )
    vars(trainer).update(
        pad_to_multiple_of=None,
        reward_clip_range=None,
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        mask_truncated_completions=False,
        normalize_advantages=False,
        log_multimodal=False,
        beta=beta,
        num_generations=GROUP,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["reward"],
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    ids = [[7] * (n - 1) + [EOS] for n in b.lengths]
    longest = max(b.lengths)
    # What lies on the padding must not count.
    padded = [
        torch.stack([torch.cat([r, r.new_full((longest - len(r),), -9.0 - k)]) for r in rows])
        for k, rows in enumerate((b.old, b.ref))
    ]
    trainer.ref_model = SimpleNamespace()
    vars(trainer).update(
        _generate=lambda _: ([[5]] * len(ids), ids, ["text"] * len(ids)),
        _calculate_rewards=lambda *_: rewards[:, None],
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            padded[int(model is trainer.ref_model)],
            None,
            None,
        ),
    )
    output = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "?"} for _ in ids])
    return output["advantages"], trainer._metrics["train"]["kl"][0]


@pytest.mark.parametrize("seed", range(6))
def test_the_kl_in_the_reward_of_rloo_is_trls(seed: int) -> None:
    rewards, b, beta = rewards_of(seed), batch(seed), 0.05
    theirs, their_kl = trl_rloo(rewards, b, beta)
    index = torch.repeat_interleave(torch.arange(len(b.lengths)), torch.tensor(b.lengths))
    kl_C = kl_of_tokens(torch.cat(b.old), torch.cat(b.ref), estimator="k1")
    samples = [
        TrainSample([], 0, "p", i, 1, n, i // GROUP, reward=r)
        for i, (n, r) in enumerate(zip(b.lengths, rewards.tolist(), strict=True))
    ]
    algorithm = AlgorithmConfig(preset="rloo", beta=beta, kl_in="reward")
    ours = penalised_advantages(samples, beta * Segments.of(index).sum(kl_C), algorithm)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    assert kl_C.mean().item() == pytest.approx(their_kl, rel=1e-6)
    assert (ours - trl_rloo(rewards, b, 1e-9)[0]).abs().max() > 1e-2
