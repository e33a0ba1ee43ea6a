"""Positions that depend on lengths: each sample's are those of its own sequence, whatever was and is computed with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.models.features.rope import has_ropes_by_length, use_ropes_of_each_sequence
from grpo_ray.models.policy import PolicyModel
from tests.models.random_models import gradients, own_logps, ragged, random_model

ORIGINAL = 12
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL, "sliding_window": None}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
]
ITEMS = ragged([(3, 5), (4, 20), (2, 10), (3, 10), (3, 9), (5, 25), (3, 3)])
"""On both sides of the threshold, and two at it: 12 tokens and 13."""


def model_of(kind: str, options: dict[str, Any], attention: str) -> Any:
    return random_model(kind, dtype=torch.float32, attention=attention, **options)


def each_alone(kind: str, options: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By a model that has seen nothing else, for each sample."""
    found: list[torch.Tensor] = []
    grads: dict[str, torch.Tensor] = {}
    weights = torch.linspace(-1, 2, sum(len(i.completion_ids) for i in ITEMS)).split(
        [len(i.completion_ids) for i in ITEMS]
    )
    for item, weight in zip(ITEMS, weights, strict=True):
        fresh = model_of(kind, options, "eager")
        logps = own_logps(fresh, [item])
        (weight * logps).sum().backward()
        found.append(logps.detach())
        for name, param in fresh.named_parameters():
            if param.grad is not None:
                grads[name] = grads[name] + param.grad if name in grads else param.grad
    return torch.cat(found), grads


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("padded", [False, True])
def test_log_probabilities_and_gradients_are_those_of_each_sequence_alone(
    kind: str, options: dict[str, Any], padded: bool
) -> None:
    want, want_gradients = each_alone(kind, options)
    hf = model_of(kind, options, "packed")
    use_ropes_of_each_sequence(hf)
    policy = PolicyModel(hf, chunk=16)
    got, _ = policy(pack(ITEMS, padded=padded), 1.0)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for name, gradient in gradients(policy, got).items():
        assert (gradient - want_gradients[name]).norm() <= 1e-4 * want_gradients[name].norm() + 1e-5, name


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=lambda x: x if isinstance(x, str) else "")
@torch.no_grad()
def test_nothing_that_was_computed_before_matters(kind: str, options: dict[str, Any]) -> None:
    hf = model_of(kind, options, "packed")
    use_ropes_of_each_sequence(hf)
    policy = PolicyModel(hf, chunk=16)

    def logps(items: list[PackItem]) -> torch.Tensor:
        return policy(pack(items), 1.0)[0]

    first = logps(ITEMS[2:4])
    logps(ITEMS[5:6])
    assert torch.equal(logps(ITEMS[2:4]), first)
    torch.testing.assert_close(torch.cat([logps([item]) for item in ITEMS]), logps(ITEMS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_it_a_longer_neighbour_changes_a_sample() -> None:
    kind, options = MODELS[0]
    policy = PolicyModel(model_of(kind, options, "packed"), chunk=16)
    alone, beside = policy(pack(ITEMS[:1]), 1.0)[0], policy(pack(ITEMS[:2]), 1.0)[0]
    assert float((alone - beside[: len(alone)]).abs().max()) > 1e-2


def test_usual_positions_do_not_depend_on_lengths() -> None:
    assert [has_ropes_by_length(model_of(kind, options, "eager")) for kind, options in MODELS] == [True, True]
    assert not has_ropes_by_length(
        random_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    )
