"""The plain path: a sequence a row, by the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch, PackItem, pack
from grpo_ray.models.attention import PACKED, choose_attention
from grpo_ray.models.plain import rows_of
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.reward import RewardModel
from grpo_ray.models.value import ValueModel
from tests.models.small import small_config, small_model
from tests.models.table import loop_logprobs

CPU = torch.device("cpu")
SHARED = {"share_prompts": True}
LAYOUTS = pytest.mark.parametrize("options", [{}, {"padded": True}, SHARED], ids=["packed", "padded", "shared"])


def make_items() -> list[PackItem]:
    """Two of one prompt, one of another; one has a single token."""
    rng = np.random.default_rng(0)
    prompts = [(rng.integers(3, 96, n), lengths) for n, lengths in ((5, (9, 1)), (3, (14,)))]
    return [
        PackItem(prompt, rng.integers(3, 96, t), rng.normal(size=t).astype(np.float32), 0.0, 1.0, 0)
        for prompt, lengths in prompts
        for t in lengths
    ]


def gradients(model: nn.Module, values_C: Tensor, items: Sequence[PackItem]) -> dict[str, Tensor]:
    model.zero_grad()
    (values_C * torch.from_numpy(np.concatenate([i.rollout_logprobs for i in items]))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    scale = torch.stack([g.norm() for g in want.values()]).norm()
    assert scale > 0.1
    assert all((got[name] - want[name]).norm() <= tolerance * scale for name in want)


@LAYOUTS
def test_each_sequence_is_a_row_whatever_it_is_packed_with(options: dict[str, bool]) -> None:
    items = make_items()
    ids_SL, places_C = rows_of(pack(items, **options), CPU)
    whole = [np.concatenate([i.prompt_ids, i.completion_ids]) for i in items]
    assert ids_SL.shape == (3, 16)
    for row, ids in zip(ids_SL, whole, strict=True):
        assert row[: len(ids) - 1].tolist() == ids[:-1].tolist()
        assert not row[len(ids) - 1 :].any()
    # A place is before its target.
    following = np.concatenate([np.pad(ids, (0, 17 - len(ids)))[1:] for ids in whole])
    assert following[places_C].tolist() == np.concatenate([i.completion_ids for i in items]).tolist()


@LAYOUTS
@pytest.mark.parametrize("kind", ["bloom", "mamba2", "qwen3_next"])
def test_log_probabilities_and_gradients_are_those_of_a_plain_loop(kind: str, options: dict[str, bool]) -> None:
    items, config = make_items(), small_config(kind)
    model = PolicyModel(small_model(config), chunk=4, plain=True).train()
    own = small_model(config).eval()
    want_C = loop_logprobs(own, items)
    got_C, entropy_C = model(pack(items, **options), 1.0)
    torch.testing.assert_close(got_C, want_C, atol=1e-5, rtol=0)
    assert (entropy_C > 0).all()
    assert_close(gradients(model.hf, got_C, items), gradients(own, want_C, items))


@torch.no_grad()
def test_changing_one_completion_changes_no_other() -> None:
    items = make_items()
    model = PolicyModel(small_model(small_config("mamba2")), chunk=8, plain=True).train()
    before, _ = model(pack(items), 1.0)
    for changed, of_one in enumerate(items):
        other = [*items]
        other[changed] = PackItem(
            of_one.prompt_ids, of_one.completion_ids[::-1] - 1, of_one.rollout_logprobs, 0.0, 1.0, 0
        )
        after, _ = model(pack(other), 1.0)
        mine = torch.from_numpy(pack(items).segments == changed)
        assert (after - before)[~mine].abs().max() <= 1e-6
        assert (after - before)[mine].abs().max() > 1e-3


def value_model(hf: nn.Module, plain: bool) -> nn.Module:
    model = ValueModel(hf, plain=plain)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def reward_model(hf: Any, plain: bool) -> nn.Module:
    hf.score = nn.Linear(64, 1, bias=False)
    nn.init.normal_(hf.score.weight, generator=torch.Generator().manual_seed(0))
    del hf.lm_head
    return RewardModel(hf, plain=plain)


MODELS: dict[str, tuple[Callable[[nn.Module, bool], nn.Module], Callable[[nn.Module, PackedBatch], Tensor]]] = {
    "policy": (lambda hf, plain: PolicyModel(hf, chunk=5, plain=plain), lambda m, batch: m(batch, 1.0)[0]),
    "critic": (value_model, lambda m, batch: m(batch)),
    "reward model": (reward_model, lambda m, batch: m(batch, 1.0)[0]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_packs_is_the_same_on_either_path(kind: str) -> None:
    make, values_of = MODELS[kind]
    items, config = make_items(), small_config("qwen2")
    choose_attention("sdpa", CPU)
    packed, plain = make(small_model(config, PACKED), False), make(small_model(config), True)
    got_C, want_C = values_of(plain, pack(items, padded=True)), values_of(packed, pack(items, **SHARED))
    torch.testing.assert_close(got_C, want_C, atol=1e-5, rtol=1e-5)
    assert_close(gradients(plain, got_C, items), gradients(packed, want_C, items))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_computed_again_give_the_same_gradient(reentrant: bool) -> None:
    items, config = make_items(), small_config("qwen3_next")
    kept, again = (PolicyModel(small_model(config), chunk=8, plain=True).train() for _ in range(2))
    hf: Any = again.hf
    hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hf.enable_input_require_grads()
    passes: list[bool] = []
    hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    got, want = (gradients(m.hf, m(pack(items), 1.0)[0], items) for m in (again, kept))
    assert len(passes) == 2
    assert_close(got, want)


def test_a_head_that_is_called_twice_is_refused() -> None:
    hf: Any = small_model(small_config("qwen2"))
    policy, once = PolicyModel(hf, chunk=8, plain=True), hf.forward
    hf.forward = lambda **kwargs: (once(**kwargs), once(**kwargs))[0]
    with pytest.raises(ValueError, match="Qwen2ForCausalLM calls its output layer 2 times in a forward pass, not once"):
        policy(pack(make_items()), 1.0)
