"""Our losses against TRL's own `GRPOTrainer._compute_loss`, called for real on a trainer without a model: the
log-probabilities that its model would give are handed to it.

Where we differ on purpose, a test says so.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.naive_losses import MAX_LENGTH, OPTIONS, Batch, correction, make_batch
from tests.packed import algorithm, gradient, run

T = TypeVar("T")
SEEDS = range(6)


def pad(rows: list[Tensor]) -> Tensor:
    """[B, T]; the padding is a number that would be noticed."""
    return torch.stack([torch.cat([r, r.new_full((MAX_LENGTH - len(r),), 0.123)]) for r in rows])


def trl_loss(
    b: Batch,
    loss_type: str,
    *,
    level: str = "token",
    beta: float = 0.0,
    unbiased_kl: bool = False,
    delta: float | None = None,
    entropy_coef: float = 0.0,
    weights: list[Tensor] | None = None,
    off_policy_mask_threshold: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What TRL makes of the batch, as one micro-batch of one process. `weights`: its `importance_sampling_ratio`."""
    trainer: Any = object.__new__(GRPOTrainer)
    trainer.args = SimpleNamespace(
        delta=delta,
        use_bias_correction_kl=unbiased_kl,
        sapo_temperature_pos=OPTIONS.sapo_temperature_pos,
        sapo_temperature_neg=OPTIONS.sapo_temperature_neg,
        steps_per_generation=1,
    )
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, **_: x
    )
    vars(trainer).update(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=OPTIONS.epsilon_low,
        epsilon_high=OPTIONS.cispo_max_ratio if loss_type == "cispo" else OPTIONS.epsilon_high,
        beta=beta,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=off_policy_mask_threshold,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy_coef > 0,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (pad(b.theta), pad(b.entropy), None),
    )
    ones = torch.tensor([[t < n for t in range(MAX_LENGTH)] for n in b.lengths]).long()
    mask = ones if mask is None else ones * mask[:, None]
    inputs = {
        "prompt_ids": torch.zeros(len(b.lengths), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(b.lengths), 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(b.advantages, dtype=torch.float64),
        "old_per_token_logps": pad(b.old),
        "sampling_per_token_logps": pad(b.rollout),
        "ref_per_token_logps": pad(b.ref),
        "num_items_in_batch": mask.sum(),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = pad(weights)
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def some_of(b: Batch, kept: list[int]) -> Batch:
    def of(values: list[T]) -> list[T]:
        return [values[i] for i in kept]

    return Batch(of(b.theta), of(b.old), of(b.rollout), of(b.ref), of(b.entropy), of(b.advantages))


def assert_same(ours: Tensor, theirs: Tensor, b: Batch) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gradient(ours, b), gradient(theirs, b), rtol=1e-6, atol=1e-12)


PAIRS = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "token"),
}
"""Ours -> TRL's loss_type and importance_sampling_level."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", PAIRS)
def test_loss_and_gradient_are_trls(kind: str, seed: int) -> None:
    b = make_batch(seed)
    loss_type, level = PAIRS[kind]
    assert_same(run(algorithm(kind), b)[0], trl_loss(b, loss_type, level=level), b)


@pytest.mark.parametrize("seed", SEEDS)
def test_in_one_micro_batch_dapo_is_trls_bnpo(seed: int) -> None:
    b = make_batch(seed)
    assert_same(run(algorithm("dapo"), b)[0], trl_loss(b, "bnpo"), b)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_with_a_kl(kind: str, unbiased: bool) -> None:
    for seed in SEEDS:
        b = make_batch(seed)
        ours, _ = run(algorithm(kind, beta=0.2, kl_estimator="k3_unbiased" if unbiased else "k3"), b)
        assert_same(ours, trl_loss(b, PAIRS[kind][0], beta=0.2, unbiased_kl=unbiased), b)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_dual_clip_is_trls_delta(kind: str) -> None:
    bounded = 0
    for seed in SEEDS:
        b = make_batch(seed, drift=1.5)
        ours, _ = run(algorithm(kind, dual_clip_c=2.0), b)
        assert_same(ours, trl_loss(b, kind, delta=2.0), b)
        bounded += not torch.equal(gradient(ours, b), gradient(run(algorithm(kind), b)[0], b))
    assert bounded


MODES = {
    "token_truncate": ("token_truncate", 0.0, 2.0),
    "token_mask": ("token_mask", 0.5, 5.0),
    "sequence_truncate": ("sequence_truncate", 0.0, 3.0),
    "sequence_mask": ("sequence_mask", 0.0, 3.0),
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(k, m) for k in PAIRS for m in MODES if not (k == "gspo" and m.startswith("token"))]
)
def test_with_a_correction_for_the_sampler(kind: str, mode: str) -> None:
    """TRL makes the weights before its loss (test_batches_trl.py); the plain loop stands in for that part."""
    for seed in SEEDS:
        b = make_batch(seed)
        loss_type, level = PAIRS[kind]
        ours, _ = run(algorithm(kind, importance_sampling=mode, beta=0.2 if kind == "grpo" else 0.0), b)
        theirs = trl_loss(
            b, loss_type, level=level, weights=correction(b, *MODES[mode]), beta=0.2 if kind == "grpo" else 0.0
        )
        assert_same(ours, theirs, b)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_off_policy_mask(kind: str) -> None:
    for seed in SEEDS:
        b = make_batch(seed)
        loss_type, level = PAIRS[kind]
        ours, _ = run(algorithm(kind, off_policy_mask_threshold=0.05), b)
        assert_same(ours, trl_loss(b, loss_type, level=level, off_policy_mask_threshold=0.05), b)


def test_the_entropy_bonus_is_trls_where_the_loss_is_a_mean_over_tokens() -> None:
    b = make_batch(1)
    assert_same(run(algorithm("dapo", entropy_coef=0.1), b)[0], trl_loss(b, "dapo", entropy_coef=0.1), b)


# Where we differ on purpose.


def test_elsewhere_our_entropy_bonus_has_the_weights_of_the_loss_and_trls_does_not() -> None:
    b = make_batch(1)
    ours, theirs = (run(algorithm("grpo", entropy_coef=0.1), b)[0], trl_loss(b, "grpo", entropy_coef=0.1))
    sequences = torch.stack([e.mean() for e in b.entropy]).mean()
    tokens = torch.cat(b.entropy).mean()
    torch.testing.assert_close(ours - theirs, 0.1 * (tokens - sequences), rtol=1e-6, atol=1e-12)


def test_a_sequence_without_part_in_the_loss_does_not_count_in_our_mean_and_counts_in_trls() -> None:
    """A truncated sample under overlong filtering, e.g."""
    b = make_batch(1)
    kept = [0, 1, 3, 4]
    fewer = some_of(b, kept)
    ours, _ = run(algorithm("grpo"), fewer)
    theirs = trl_loss(b, "grpo", mask=torch.tensor([1, 1, 0, 1, 1, 0]))
    torch.testing.assert_close(ours, theirs * 6 / 4, rtol=1e-6, atol=1e-12)
    by_tokens = trl_loss(b, "dapo", mask=torch.tensor([1, 1, 0, 1, 1, 0]))
    torch.testing.assert_close(run(algorithm("dapo"), fewer)[0], by_tokens, rtol=1e-6, atol=1e-12)


def test_trls_mean_is_of_each_micro_batch_and_ours_of_the_step() -> None:
    b = make_batch(1)
    halves = [some_of(b, half) for half in ([0, 1, 2], [3, 4, 5])]
    ours, _ = run(algorithm("dapo"), b, [[0, 1, 2], [3, 4, 5]])
    theirs = torch.stack([trl_loss(half, "bnpo") for half in halves]).mean()
    assert abs(ours.item() - theirs.item()) > 1e-3
    torch.testing.assert_close(ours, trl_loss(b, "bnpo"), rtol=1e-6, atol=1e-12)


def test_our_unbiased_kl_takes_the_tokens_ratio_where_trls_takes_the_sequences() -> None:
    b = make_batch(1)
    ours, _ = run(algorithm("gspo", beta=0.2, kl_estimator="k3_unbiased"), b)
    theirs = trl_loss(b, "grpo", level="sequence", beta=0.2, unbiased_kl=True)
    assert abs(ours.item() - theirs.item()) > 1e-4
