"""Every objective as its paper writes it: a loop over sequences and tokens, on scalars. Gradients are autograd's, through
Python's own min and max. Slow, and independent of the packed code that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ray.algorithm.losses.policy import LossOptions

OPTIONS = LossOptions(
    epsilon_low=0.2,
    epsilon_high=0.28,
    dual_clip_c=None,
    cispo_max_ratio=1.6,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.0625,
)
"""cispo's cap is low, so that it is met. TRL keeps sapo's temperatures in fp32, which holds these exactly."""
MAX_LENGTH = 9
Rows = Sequence[Tensor]
"""[T] of each sequence, float64."""


@dataclass(frozen=True)
class Batch:
    """Ragged: sequences of 1 to 9 tokens. Leaves: `theta` has a gradient."""

    theta: list[Tensor]
    old: list[Tensor]
    rollout: list[Tensor]
    ref: list[Tensor]
    entropy: list[Tensor]
    advantages: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.theta]


def make_batch(seed: int, num: int = 6, drift: float = 0.4) -> Batch:
    """`drift`: how far theta has moved from old, in nats."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_LENGTH + 1, (num,), generator=g).tolist()

    def around(rows: Rows, scale: float) -> list[Tensor]:
        return [r.detach() + scale * torch.randn(len(r), generator=g, dtype=torch.float64) for r in rows]

    zeros = [torch.zeros(n, dtype=torch.float64) for n in lengths]
    theta = [(-r.abs() - 0.1) for r in around(zeros, 2.0)]
    old = around(theta, drift)
    advantages = torch.randn(num, generator=g, dtype=torch.float64).tolist()
    advantages[seed % num] = 0.0
    return Batch(
        theta=[t.requires_grad_() for t in theta],
        old=old,
        rollout=around(old, 0.5),
        ref=around(theta, 0.5),
        entropy=[r.abs().requires_grad_() for r in around(zeros, 1.0)],
        advantages=advantages,
    )


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def clip_loss(ratio: Tensor, adv: float, o: LossOptions) -> Tensor:
    bounded = min(max(ratio, number(1 - o.epsilon_low)), number(1 + o.epsilon_high))
    loss = -min(ratio * adv, bounded * adv)
    if o.dual_clip_c is not None and adv < 0:
        loss = min(loss, number(-o.dual_clip_c * adv))
    return loss


def token_losses(kind: str, theta: Tensor, old: Tensor, adv: float, o: LossOptions) -> list[Tensor]:
    """Of one sequence, for the objectives that look at each token by itself."""
    out = []
    for t, p in zip(theta, old, strict=True):
        ratio = (t - p).exp()
        if kind == "cispo":
            out.append(-min(ratio.item(), o.cispo_max_ratio) * adv * t)
        elif kind == "sapo":
            tau = o.sapo_temperature_pos if adv > 0 else o.sapo_temperature_neg
            out.append(-(4 / tau) * adv / (1 + (-tau * (ratio - 1)).exp()))
        else:
            out.append(clip_loss(ratio, adv, o))
    return out


def sequence_loss(kind: str, theta: Tensor, old: Tensor, adv: float, o: LossOptions) -> Tensor:
    """Of one sequence, for the objectives with one ratio for all of it."""
    ratio = number(1.0)
    if kind == "gmpo":
        for t, p in zip(theta, old, strict=True):
            r = (t - p).exp()
            r = min(r, number(math.exp(o.epsilon_high))) if adv > 0 else max(r, number(math.exp(-o.epsilon_low)))
            ratio = ratio * r
        return -(ratio ** (1 / len(theta))) * adv
    for t, p in zip(theta, old, strict=True):
        ratio = ratio * (t - p).exp()
    return clip_loss(ratio if kind == "grpo_sequence" else ratio ** (1 / len(theta)), adv, o)


SEQUENCE = ("grpo_sequence", "gspo", "gmpo")


def total(values: Sequence[Tensor]) -> Tensor:
    return sum(values, number(0.0))


def reduce(kind: str, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Token values -> one number, as the objective does it."""
    sums = [total(row) for row in rows]
    lengths = [len(row) for row in rows]
    if kind in ("dapo", "cispo"):
        return total(sums) / sum(lengths)
    if kind == "dr_grpo":
        return total(sums) / (len(rows) * MAX_LENGTH)
    if kind == "grpo_sequence":
        return total(sums) / len(rows)
    return total([s / n for s, n in zip(sums, lengths, strict=True)]) / len(rows)


def policy_loss(kind: str, b: Batch, o: LossOptions, weights: Rows | None = None) -> Tensor:
    """`weights`: of the correction, [T] of each sequence; the same at all tokens for objectives of whole sequences."""
    w = weights or [torch.ones(n, dtype=torch.float64) for n in b.lengths]
    pairs = list(zip(b.theta, b.old, b.advantages, strict=True))
    if kind in SEQUENCE:
        losses = [w[i][0] * sequence_loss(kind, t, p, a, o) for i, (t, p, a) in enumerate(pairs)]
        return total(losses) / len(losses)
    rows = [
        [x * y for x, y in zip(w[i], token_losses(kind, t, p, a, o), strict=True)] for i, (t, p, a) in enumerate(pairs)
    ]
    return reduce(kind, rows)


def kl_tokens(estimator: str, b: Batch) -> list[list[Tensor]]:
    out = []
    for theta, ref, old in zip(b.theta, b.ref, b.old, strict=True):
        row = []
        for t, r, p in zip(theta, ref, old, strict=True):
            d = t - r
            k3 = (r - t).exp() - (r - t) - 1
            row.append({"k1": d, "k2": d * d / 2, "k3": k3, "k3_unbiased": (t - p).exp() * k3}[estimator])
        out.append(row)
    return out


def correction(
    b: Batch,
    kind: str | None,
    low: float,
    high: float,
    geometric: tuple[float, float] | None = None,
    off_policy: float | None = None,
) -> list[Tensor]:
    """Weights of the tokens, [T] of each sequence, without gradient."""
    rows = []
    for theta, old, rollout, adv in zip(b.theta, b.old, b.rollout, b.advantages, strict=True):
        ratios = [math.exp(p - q) for p, q in zip(old.tolist(), rollout.tolist(), strict=True)]
        row = [1.0] * len(ratios)
        if kind is not None:
            raw = [math.prod(ratios)] * len(ratios) if kind.startswith("sequence") else ratios
            if kind.endswith("truncate"):
                row = [min(max(w, low), high) for w in raw]
            else:
                row = [w if low <= w <= high else 0.0 for w in raw]
        if geometric is not None and not geometric[0] <= math.prod(ratios) ** (1 / len(ratios)) <= geometric[1]:
            row = [0.0] * len(row)
        if off_policy is not None and adv < 0:
            moved = sum(q - t for q, t in zip(rollout.tolist(), theta.tolist(), strict=True)) / len(row)
            row = [0.0] * len(row) if moved > off_policy else row
        rows.append(torch.tensor(row, dtype=torch.float64))
    return rows
