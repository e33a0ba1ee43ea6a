"""Every loss over episodes: its gradient is that of a plain loop over whole sequences with a mask, and what the environment wrote
is in no sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.policy import PolicyModel
from tests.naive_losses import (
    MAX_LENGTH,
    OPTIONS,
    SEQUENCE,
    Batch,
    correction,
    kl_tokens,
    policy_loss,
    reduce,
)
from tests.packed import algorithm

CPU = torch.device("cpu")
TEMPERATURE = 0.9
BETA, ENTROPY = 0.05, 0.02
EPISODES = [
    (0, "mmm..mm...m"),
    (0, "m"),
    (0, "..mmmm."),
    (1, "m.m.m.m.m"),
    (1, "mmmmmmmmm"),
    (2, "mm........mm.."),
]
"""(prompt, completion): `m` is a token of the model, `.` one of the environment."""
MASKS = [np.array([c == "m" for c in completion]) for _, completion in EPISODES]
ADVANTAGES = [1.0, -0.5, 0.7, -1.2, 0.3, 0.9]


def noise(name: str, index: int, num: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([sum(map(ord, name)), index]).normal(0, 0.3, num)


def ids_of(index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    prompt, completion = EPISODES[index]
    rng = np.random.default_rng(index)
    return np.random.default_rng(100 + prompt).integers(8, 200, 3 + prompt), rng.integers(8, 200, len(completion))


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[bool, PolicyModel]:
    """By whether it is on the plain path."""
    from transformers import AutoModelForCausalLM

    made = {}
    for plain in (False, True):
        how = "sdpa" if plain else choose_attention("sdpa", CPU)
        hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=how)
        made[plain] = PolicyModel(hf, chunk=4, plain=plain)
    return made


@pytest.fixture(scope="module")
def own(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")


def loop_batch(own: Any) -> Batch:
    """Sequence by sequence, all logits of its completion, of which the mask keeps the model's."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ("theta", "entropy", "old", "rollout", "ref")}
    for index, mask in enumerate(MASKS):
        prompt, completion = ids_of(index)
        ids = torch.from_numpy(np.concatenate([prompt, completion]))
        logits = own(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logps = logits.log_softmax(-1)
        theta = logps.gather(-1, torch.from_numpy(completion)[:, None])[:, 0][mask].double()
        rows["theta"].append(theta)
        rows["entropy"].append(-(logps.exp() * logps).sum(-1)[mask].double())
        for name in ("old", "rollout", "ref"):
            rows[name].append(theta.detach() + torch.from_numpy(noise(name, index, len(mask))[mask]))
    return Batch(**rows, advantages=ADVANTAGES)


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def item(index: int, objective: GrpoObjective, theta: list[Tensor]) -> PackItem:
    """The episode as the learner packs it; the sampler's log-probabilities are of its own tokens, and no number elsewhere."""
    prompt, completion = ids_of(index)
    mask = MASKS[index]
    rollout = np.full(len(mask), np.nan, np.float32)
    rollout[mask] = theta[index].detach().numpy() + noise("rollout", index, len(mask))[mask]
    n = Normalizers(len(MASKS), int(sum(m.sum() for m in MASKS)), MAX_LENGTH)
    weight = objective.weight(int(mask.sum()), n)
    return PackItem(prompt, completion, rollout, ADVANTAGES[index], weight, index, sampled=mask)


def around(name: str, theta: list[Tensor], members: list[int]) -> Tensor:
    return torch.cat(
        [theta[i].detach().float() + torch.from_numpy(noise(name, i, len(MASKS[i]))[MASKS[i]]).float() for i in members]
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"padded": True},
    "shared": {"share_prompts": True},
    "plain": {"plain": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_the_gradient_of_episodes_is_that_of_a_loop_with_a_mask(
    kind: str, layout: str, models: dict[bool, PolicyModel], own: Any
) -> None:
    level = "sequence" if kind in SEQUENCE else "token"
    config = algorithm(
        kind,
        beta=BETA,
        kl_estimator="k3",
        entropy_coef=ENTROPY,
        old_logprobs="recompute",
        importance_sampling=f"{level}_truncate",
        importance_sampling_clip_max=1.5,
        geometric_mask=[0.5, 2.0],
    )
    b = loop_batch(own)
    weights = correction(b, config.importance_sampling, config.importance_sampling_clip_min, 1.5, (0.5, 2.0))
    entropy = reduce(kind, [list(row) for row in b.entropy])
    kl = reduce(kind, kl_tokens("k3", b))
    loss = policy_loss(kind, b, OPTIONS, weights) + BETA * kl - ENTROPY * entropy
    want = gradient_of(own, loss)

    options = dict(LAYOUTS[layout])
    model = models[options.pop("plain", False)]
    objective = GrpoObjective(config)
    total, sums = torch.zeros(()), torch.zeros(len(objective.sum_names))
    for members in ([0, 1, 2, 3], [4, 5]):
        data = MicroBatchData.of(pack([item(i, objective, b.theta) for i in members], **options), CPU)
        data.old_logps_C, data.ref_logps_C = around("old", b.theta, members), around("ref", b.theta, members)
        theta_C, entropy_C = model(data.packed, TEMPERATURE)
        part, own_sums, _ = objective.loss(data, theta_C, entropy_C)
        total, sums = total + part, sums + own_sums.detach()
    got = gradient_of(model, total)
    assert want.norm() > 1e-3
    assert (got - want).norm() < 1e-5 * want.norm()
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    named = dict(zip(objective.sum_names, sums.tolist(), strict=True))
    assert (named["tokens"], named["sequences"]) == (sum(m.sum() for m in MASKS), len(MASKS))
    assert named["entropy"] == pytest.approx(torch.cat(b.entropy).sum().item(), rel=1e-5)
    assert named["kl_ref"] == pytest.approx(sum(k.item() for row in kl_tokens("k3", b) for k in row), rel=1e-4)
    assert named["stale"] + named["compared"] == named["tokens"]
