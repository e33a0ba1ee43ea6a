"""DPO and reward-model losses over packed micro-batches: against a naive loop in float64, and against TRL's own code."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.algorithm.objectives_pairs import DpoObjective, RewardModelObjective
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.plan import plan_batch
from grpo_ray.batch.segments import Segments
from grpo_ray.config.supervised import DpoOptions, RewardModelOptions
from grpo_ray.loop.supervised import held_out

BETA = 0.3
PAIRS = 5
LENGTHS = [4, 1, 7, 3, 2, 2, 1, 6, 5, 4]
"""Chosen, rejected, chosen, .."""
SPLITS = [[range(10)], [range(4), range(4, 10)], [range(2 * p, 2 * p + 2) for p in range(PAIRS)]]


class Rows:
    """Log-probabilities (or values) of every token, and of the reference; targets of every sequence."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.theta = [torch.from_numpy(rng.normal(-2, 1, n)).requires_grad_() for n in LENGTHS]
        self.ref = [torch.from_numpy(rng.normal(-2, 1, n)) for n in LENGTHS]
        self.targets = rng.uniform(0, 1, len(LENGTHS))


def micro_batch(rows: Rows, members: range, objective: Any) -> MicroBatchData:
    n = Normalizers(num_sequences=len(LENGTHS), num_tokens=sum(LENGTHS), max_completion_length=9)
    empty = [
        PackItem(np.zeros(2, int), np.zeros(LENGTHS[i], int), np.zeros(LENGTHS[i], np.float32), 0, 0, i)
        for i in members
    ]
    packed = pack(empty)

    def spread(values: list[float]) -> Tensor:
        return torch.cat(
            [torch.full((LENGTHS[i],), v, dtype=torch.float64) for i, v in zip(members, values, strict=True)]
        )

    segments = Segments.of(torch.from_numpy(packed.segments))
    return MicroBatchData(
        packed,
        rollout_logps_C=spread([0.0] * len(members)),
        advantages_C=spread([0.0] * len(members)),
        weights_C=spread([objective.weight(LENGTHS[i], n) for i in members]),
        segments=segments,
        targets_S=torch.from_numpy(rows.targets[list(members)]),
        ref_logps_S=segments.sum(torch.cat([rows.ref[i] for i in members])),
    )


def run(objective: Any, rows: Rows, split: list[range]) -> tuple[Tensor, dict[str, float]]:
    total = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(len(objective.sum_names), dtype=torch.float64)
    for members in split:
        theta = torch.cat([rows.theta[i] for i in members])
        loss, new, _ = objective.loss(micro_batch(rows, members, objective), theta, torch.zeros_like(theta))
        total, sums = total + loss, sums + new
    return total, objective.metrics(dict(zip(objective.sum_names, sums.tolist(), strict=True)), 0.0, 1)


def gradient(loss: Tensor, rows: Rows) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, rows.theta, retain_graph=True))


def naive_dpo(rows: Rows, kind: str) -> Tensor:
    losses = []
    for p in range(PAIRS):
        w, r = 2 * p, 2 * p + 1
        chosen, rejected = (rows.theta[w] - rows.ref[w]).sum(), (rows.theta[r] - rows.ref[r]).sum()
        if kind == "ipo":
            losses.append((chosen / LENGTHS[w] - rejected / LENGTHS[r] - 1 / (2 * BETA)) ** 2)
        else:
            losses.append(-torch.log(1 / (1 + torch.exp(-BETA * (chosen - rejected)))))
    return sum(losses, torch.zeros(())) / PAIRS


def trl_dpo(rows: Rows, kind: str) -> tuple[Tensor, dict[str, float]]:
    """What TRL's `DPOTrainer._compute_loss` makes of them, with the log-probabilities that its model would give."""
    order = [*range(0, 10, 2), *range(1, 10, 2)]
    longest = max(LENGTHS)

    def pad(values: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat([values[i], values[i].new_zeros(longest - len(values[i]))]) for i in order])

    mask = torch.tensor([[0] + [t < LENGTHS[i] for t in range(longest)] for i in order]).long()
    trainer: Any = object.__new__(DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    vars(trainer).update(
        aux_loss_enabled=False,
        use_weighting=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=BETA,
        label_smoothing=0.0,
        loss_types=[kind],
        loss_weights=[1.0],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros(10, longest)
    outputs = SimpleNamespace(log_probs=pad(rows.theta), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    refs = torch.stack([rows.ref[i].sum() for i in order])
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": refs[:PAIRS],
        "ref_rejected_logps": refs[PAIRS:],
    }
    loss = trainer._compute_loss(lambda **kwargs: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
@pytest.mark.parametrize("split", SPLITS, ids=["one", "two", "each"])
@pytest.mark.parametrize("seed", range(3))
def test_dpo_is_the_naive_loop_and_trls_for_any_split(kind: Any, split: list[range], seed: int) -> None:
    rows = Rows(seed)
    loss, metrics = run(DpoObjective(DpoOptions(loss=kind, beta=BETA)), rows, split)
    want = naive_dpo(rows, kind)
    theirs, told = trl_dpo(rows, kind)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient(loss, rows), gradient(want, rows), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient(loss, rows), gradient(theirs, rows), rtol=1e-5, atol=1e-8)
    assert metrics["loss/dpo"] == pytest.approx(loss.item())
    assert metrics["pairs/accuracy"] == pytest.approx(told["rewards/accuracies"])
    assert metrics["pairs/margin"] == pytest.approx(told["rewards/margins"])
    assert metrics["pairs/chosen"] == pytest.approx(told["rewards/chosen"])
    assert metrics["logps/rejected"] == pytest.approx(told["logps/rejected"])


def test_dpo_of_the_reference_itself_is_the_logarithm_of_two_and_pulls_the_answers_apart() -> None:
    rows = Rows(0)
    rows.ref = [t.detach().clone() for t in rows.theta]
    loss, metrics = run(DpoObjective(DpoOptions(beta=BETA)), rows, SPLITS[1])
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["pairs/margin"] == 0.0
    # -beta/2 x 1/P for every token of a chosen answer, + for those of a rejected one.
    signs = torch.cat([torch.full((n,), -1.0 if i % 2 == 0 else 1.0) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(gradient(loss, rows), (BETA / 2 / PAIRS * signs).double())


def last(rows: Rows) -> Tensor:
    return torch.stack([t[-1] for t in rows.theta])


def trl_reward(rows: Rows, margins: Tensor | None) -> Tensor:
    trainer: Any = object.__new__(RewardTrainer)
    trainer.model = SimpleNamespace(training=False)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.args = SimpleNamespace(center_rewards_coefficient=None)
    vars(trainer).update(_metrics={"eval": defaultdict(list)}, _total_train_tokens=0)
    scores = last(rows)
    logits = torch.cat([scores[::2], scores[1::2]])[:, None]
    inputs = {} if margins is None else {"margin": margins}

    def model(margin: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=logits)

    return trainer.compute_loss(model, inputs)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("split", SPLITS, ids=["one", "two", "each"])
def test_a_reward_model_of_pairs_is_trls_and_reads_the_last_token(margin: bool, split: list[range]) -> None:
    rows = Rows(4)
    rows.targets = np.repeat(rows.targets[::2], 2) if margin else np.zeros(10)
    loss, metrics = run(RewardModelObjective(RewardModelOptions(use_margin=margin)), rows, split)
    scores = last(rows)
    gaps = [(scores[2 * p] - scores[2 * p + 1]).item() for p in range(PAIRS)]
    want = [-math.log(1 / (1 + math.exp(rows.targets[2 * p] - gaps[p]))) for p in range(PAIRS)]
    theirs = trl_reward(rows, torch.from_numpy(rows.targets[::2]) if margin else None)
    assert loss.item() == pytest.approx(sum(want) / PAIRS, rel=1e-12)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(gradient(loss, rows), gradient(theirs, rows))
    assert metrics["pairs/accuracy"] == sum(g > 0 for g in gaps) / PAIRS
    assert metrics["pairs/margin"] == pytest.approx(sum(gaps) / PAIRS)
    moved = torch.cat([torch.tensor([0.0] * (n - 1) + [1.0]) for n in LENGTHS]).bool()
    assert (gradient(loss, rows) != 0).tolist() == moved.tolist()


@pytest.mark.parametrize("kind", ["bce", "mse"])
@pytest.mark.parametrize("split", SPLITS[:2], ids=["one", "two"])
def test_a_reward_model_of_labels_is_the_naive_loop(kind: Any, split: list[range]) -> None:
    rows = Rows(5)
    loss, metrics = run(RewardModelObjective(RewardModelOptions(loss=kind)), rows, split)
    want = []
    for score, label in zip(last(rows).tolist(), rows.targets, strict=True):
        p = 1 / (1 + math.exp(-score))
        want.append((score - label) ** 2 if kind == "mse" else -label * math.log(p) - (1 - label) * math.log(1 - p))
    assert loss.item() == pytest.approx(sum(want) / 10, rel=1e-9)
    if kind == "bce":
        right = [(s > 0) == (y > 0.5) for s, y in zip(last(rows).tolist(), rows.targets, strict=True)]
        assert metrics["score/accuracy"] == sum(right) / 10
    else:
        gaps = [abs(s - y) for s, y in zip(last(rows).tolist(), rows.targets, strict=True)]
        assert metrics["score/error"] == pytest.approx(sum(gaps) / 10)


@pytest.mark.parametrize("objective", [DpoObjective(DpoOptions(beta=BETA)), RewardModelObjective(RewardModelOptions())])
def test_of_two_answers_that_are_worth_the_same_the_chosen_one_is_not_ahead(objective: Any) -> None:
    """A model that says the same of everything is right about nothing."""
    rows = Rows(0)
    rows.theta = [torch.full((n,), -1.0, dtype=torch.float64, requires_grad=True) for n in LENGTHS]
    rows.ref = [t.detach().clone() for t in rows.theta]
    rows.targets = np.zeros(len(LENGTHS))
    _, metrics = run(objective, rows, SPLITS[0])
    assert (metrics["pairs/accuracy"], metrics["pairs/margin"]) == (0.0, 0.0)
    assert held_out(torch.ones(3, 2), torch.zeros(3)) == {"accuracy": 0.0, "margin": 0.0}


@pytest.mark.parametrize(
    ("score", "label", "right"),
    [(1.0, 1.0, 1), (-1.0, 0.0, 1), (1.0, 0.7, 1), (-1.0, 0.7, 0), (1.0, 0.3, 0), (-1.0, 0.3, 1), (0.0, 0.7, 0)],
)
def test_a_label_between_0_and_1_is_met_on_its_side_of_the_half(score: float, label: float, right: int) -> None:
    rows = Rows(0)
    rows.theta = [torch.full((n,), score, dtype=torch.float64, requires_grad=True) for n in LENGTHS]
    rows.targets = np.full(len(LENGTHS), label)
    loss, metrics = run(RewardModelObjective(RewardModelOptions(loss="bce")), rows, SPLITS[0])
    assert metrics["score/accuracy"] == right
    assert held_out(torch.tensor([[score]]), torch.tensor([label]))["accuracy"] == right
    p = 1 / (1 + math.exp(-score))
    assert loss.item() == pytest.approx(-label * math.log(p) - (1 - label) * math.log(1 - p))


@pytest.mark.parametrize("objective", [DpoObjective(DpoOptions()), RewardModelObjective(RewardModelOptions())])
def test_a_dummy_adds_nothing_and_keeps_the_graph(objective: Any) -> None:
    data = MicroBatchData.of(pack([]), torch.device("cpu"))
    theta = torch.ones(1, requires_grad=True)
    loss, sums, _ = objective.loss(data, theta, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0.0
    assert not sums.any()
    assert theta.grad is not None
    assert theta.grad.tolist() == [0.0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_both_answers_of_a_pair_are_in_one_micro_batch_side_by_side(ranks: int, padded: bool) -> None:
    both = list(zip(LENGTHS[::2], LENGTHS[1::2], strict=True))
    (plan,) = plan_batch(
        [2 * max(pair) if padded else sum(pair) for pair in both],
        range(PAIRS),
        num_ranks=ranks,
        num_mini_batches=1,
        micro_batch_tokens=14,
        padded=padded,
    )
    expanded = plan.of_pairs()
    assert expanded.samples == list(range(10))
    for rank in expanded.ranks:
        for micro in rank:
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(micro[::2], micro[1::2], strict=True))
            tokens = (
                len(micro) * max((LENGTHS[i] for i in micro), default=0) if padded else sum(LENGTHS[i] for i in micro)
            )
            assert tokens <= 14
