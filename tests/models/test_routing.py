"""The load-balancing loss of routers, the load of experts, and routes that are kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.errors import ConfigError
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.checks.routers import check_routers
from grpo_ray.models.features.routing import Routing, RoutingSums, find_routers
from grpo_ray.models.policy import PolicyModel
from tests.models.random_models import gradients, ragged, random_model
from tests.models.small import small_config, small_model

COEF = 0.3
SHARED = [(3, 5), (3, 4), (6, 7), (4, 1)]
"""The lengths of prompts and completions; the first two have one prompt."""


def policy_of(hf: nn.Module, *, plain: bool = False, coef: float = 0.0) -> PolicyModel:
    routing = Routing(find_routers(hf))
    routing.coef = coef
    return PolicyModel(hf, chunk=16, plain=plain, routing=routing).train()


def model_of(kind: str, *, plain: bool = False) -> nn.Module:
    options = {"norm_topk_prob": True} if kind == "qwen3_moe" else {}
    return random_model(kind, attention="eager" if plain else "packed", dtype=torch.float32, **options)


def items() -> list[PackItem]:
    first, second, *rest = ragged(SHARED)
    return [first, replace(second, prompt_ids=first.prompt_ids), *rest]


def own_loss(hf: Any, item: PackItem) -> Tensor:
    """Transformers' loss of one sequence, unpadded, without the last token: nothing is computed of it."""
    ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.completion_ids[:-1]]))[None]
    logits = hf(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    loss = load_balancing_loss_func(logits, logits[0].shape[-1], hf.config.num_experts_per_tok)
    assert isinstance(loss, Tensor)
    return loss


def injected(policy: PolicyModel, batches: list[list[PackItem]], **packing: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of all batches, each a micro-batch that weighs as much as it has sequences, and its gradient alone."""
    assert policy.routing is not None
    policy.zero_grad()
    total, num = 0.0, sum(map(len, batches))
    for batch in batches:
        policy.routing.weigh = lambda packed: np.full(len(packed.sequences), 1 / num, np.float32)
        (0 * policy(pack(batch, **packing), 1.0)[0].sum()).backward()
        assert policy.routing.last is not None
        assert policy.routing.last.loss is not None
        total += float(policy.routing.last.loss)
    return total, {n.removeprefix("hf."): p.grad for n, p in policy.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, grad in want.items():
        torch.testing.assert_close(got[name], COEF * grad, rtol=1e-4, atol=1e-6, msg=name)
    routers = [name for name, grad in want.items() if ("gate." in name or "router." in name) and grad.abs().sum() > 0]
    assert routers


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_the_loss_of_one_sequence_and_its_gradient_are_those_of_transformers(kind: str) -> None:
    hf = model_of(kind)
    (item,) = ragged([(5, 9)])
    own = copy.deepcopy(hf)
    own.set_attn_implementation("eager")  # type: ignore[operator]
    want = own_loss(own, item)
    total, got = injected(policy_of(hf, coef=COEF), [[item]])
    assert total == pytest.approx(COEF * float(want.detach()), rel=1e-5)
    assert_same(got, gradients(own, want[None] * -1))


@pytest.mark.parametrize(
    ("plain", "packing"),
    [(False, {}), (False, {"share_prompts": True}), (False, {"padded": True}), (True, {"padded": True})],
    ids=["packed", "shared", "padded", "plain"],
)
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_the_loss_of_a_batch_is_the_mean_of_its_sequences_however_they_are_computed(
    plain: bool, packing: dict[str, bool], checkpointing: dict[str, bool] | None
) -> None:
    hf = model_of("qwen3_moe", plain=plain)
    own = copy.deepcopy(hf)
    own.set_attn_implementation("eager")  # type: ignore[operator]
    want = own_mean(own)
    if checkpointing is not None:
        hf.gradient_checkpointing_enable(checkpointing)  # type: ignore[operator]
        hf.enable_input_require_grads()  # type: ignore[operator]
    policy = policy_of(hf, plain=plain, coef=COEF)
    for batches in ([items()], [items()[:2], items()[2:]]):
        total, got = injected(policy, batches, **packing)
        assert total == pytest.approx(COEF * float(want.detach()), rel=1e-5)
        assert_same(got, gradients(own, -own_mean(own)[None]))


def own_mean(own: nn.Module) -> Tensor:
    return torch.stack([own_loss(own, item) for item in items()]).mean()


class Choosing(nn.Module):
    """Qwen3-MoE's router by the book, over experts that are given: their probabilities, normalised."""

    def __init__(self, router: Any, experts_nk: Tensor) -> None:
        super().__init__()
        self.weight, self.experts_nk = router.weight, experts_nk

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        probs = logits.softmax(-1).gather(-1, self.experts_nk)
        return logits, probs / probs.sum(-1, keepdim=True), self.experts_nk


def with_routes(item: PackItem, seed: int = 0, *, experts: int = 4, layers: int = 2) -> PackItem:
    """The sample with two random experts a token and layer."""
    rng, num = np.random.default_rng(seed), len(item.prompt_ids) + len(item.completion_ids) - 1
    routes = np.array([[rng.permutation(experts)[:2] for _ in range(layers)] for _ in range(num)], np.uint8)
    return replace(item, routes=routes)


def routed_items() -> list[PackItem]:
    """Samples with routes; those of a prompt that two have are the same."""
    first, second, *rest = (with_routes(item, seed) for seed, item in enumerate(items()))
    assert first.routes is not None
    assert second.routes is not None
    second.routes[: len(first.prompt_ids)] = first.routes[: len(first.prompt_ids)]
    return [first, second, *rest]


def by_the_book(hf: Any, item: PackItem) -> Tensor:
    """[T] the log-probabilities of a sample with the experts of its routes, by the model's own forward."""
    model, routes = copy.deepcopy(hf), item.routes
    assert routes is not None
    model.set_attn_implementation("eager")
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate = Choosing(block.mlp.gate, torch.from_numpy(routes[:, layer].astype(np.int64)))
    ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.completion_ids]))
    logps = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    return logps[len(item.prompt_ids) - 1 :].gather(-1, torch.from_numpy(item.completion_ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("plain", "packing"),
    [(False, {}), (False, {"share_prompts": True}), (False, {"padded": True}), (True, {"padded": True})],
    ids=["packed", "shared", "padded", "plain"],
)
def test_kept_experts_are_taken_with_the_weights_that_the_router_gives_them(
    plain: bool, packing: dict[str, bool]
) -> None:
    hf = model_of("qwen3_moe", plain=plain)
    want = torch.cat([by_the_book(hf, item) for item in routed_items()])
    got = policy_of(hf, plain=plain)(pack(routed_items(), **packing), 1.0)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    own = policy_of(model_of("qwen3_moe", plain=plain), plain=plain)(pack(items(), **packing), 1.0)[0]
    assert (got - own).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_layers_that_compute_their_activations_again_take_the_kept_experts_again(
    checkpointing: dict[str, bool],
) -> None:
    batch = pack(routed_items())
    want = policy_of(model_of("qwen3_moe"))
    grads = gradients(want, want(batch, 1.0)[0])
    hf: Any = model_of("qwen3_moe")
    hf.gradient_checkpointing_enable(checkpointing)
    hf.enable_input_require_grads()
    policy = policy_of(hf)
    again = gradients(policy, policy(batch, 1.0)[0])
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "minimax_m2"])
def test_the_experts_of_a_pass_taken_again_change_nothing(kind: str) -> None:
    config = small_config(kind)
    hf = small_model(config, choose_attention("sdpa", torch.device("cpu")))
    policy = PolicyModel(hf, chunk=16, routing=Routing(find_routers(hf))).eval()
    taken: dict[int, Tensor] = {}
    for router in find_routers(hf):
        router.module.register_forward_hook(
            lambda _m, _a, out, router=router: taken.__setitem__(router.layer, out[router.roles(out)[1]])
        )
    (item,) = ragged([(5, 9)])
    want = policy(pack([item]), 1.0)[0]
    routes = torch.zeros(13, config.num_hidden_layers, 2, dtype=torch.long)
    for layer, experts_nk in taken.items():
        routes[:, layer] = experts_nk
    first, swapped = (policy(pack([replace(item, routes=r.numpy())]), 1.0)[0] for r in (routes, routes.flip(-1)))
    assert torch.equal(first, want)
    torch.testing.assert_close(swapped, want, rtol=1e-5, atol=1e-5)


def test_the_load_counts_each_computed_token_once_and_no_padding() -> None:
    policy = policy_of(model_of("qwen3_moe"))
    assert policy.routing is not None
    policy(pack(routed_items(), padded=True), 1.0)
    routes = np.concatenate([item.routes for item in routed_items() if item.routes is not None])
    assert policy.routing.last is not None
    for layer in (0, 1):
        want = np.bincount(routes[:, layer].flatten(), minlength=4)
        assert policy.routing.last.load[layer].tolist() == want.tolist()
    policy(pack(routed_items(), share_prompts=True), 1.0)
    assert sum(policy.routing.last.load[0].tolist()) == 2 * (len(routes) - 3)


def test_a_dummy_weighs_nothing_and_is_not_counted() -> None:
    policy = policy_of(model_of("qwen3_moe"), coef=COEF)
    assert policy.routing is not None
    (0 * policy(pack([]), 1.0)[0].sum()).backward()
    assert policy.routing.last is None
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_a_pass_without_gradients_is_not_counted_and_changes_no_later_one() -> None:
    policy = policy_of(model_of("qwen3_moe"), coef=COEF)
    with torch.no_grad():
        kept = policy(pack(routed_items()), 1.0)[0]
    assert policy.routing is not None
    assert policy.routing.last is None
    own = policy(pack(items()), 1.0)[0]
    assert (kept - own).abs().max() > 0.1


def test_a_router_that_does_not_choose_by_a_top_k_is_refused_where_routes_are_kept() -> None:
    with pytest.raises(ValueError, match="PhimoeTopKRouter does not choose its experts as a top-k of all of them"):
        policy_of(model_of("phimoe"))(pack(routed_items()), 1.0)


def skeleton_of(kind: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return small_model(small_config(kind, **options))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "minimax_m2"])
def test_routers_of_usual_families_are_taken(kind: str) -> None:
    check_routers(skeleton_of(kind), loss=True, keeps=True)


@pytest.mark.parametrize(
    ("kind", "options", "loss", "why"),
    [
        ("qwen3", {}, True, "learner.router_aux_loss_coef and rollout.keep_routing: Qwen3ForCausalLM is no mixture"),
        (
            "jamba",
            {},
            False,
            "rollout.keep_routing: JambaForCausalLM is no mixture of experts, or its routers are no modules",
        ),
        ("phimoe", {}, False, r"not supported \(.*PhimoeTopKRouter does not choose its experts as a top-k"),
        ("llama4_text", {}, True, r"Llama4Router does not return logits, scores and experts"),
        (
            "deepseek_v2",
            {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"},
            False,
            "DeepseekV2TopkRouter gives no weight to experts outside of the groups that it chooses",
        ),
    ],
    ids=["dense", "no module", "no top-k", "other outputs", "groups"],
)
def test_routers_of_no_known_kind_are_refused_by_name(kind: str, options: dict[str, Any], loss: bool, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_routers(skeleton_of(kind, **options), loss=loss, keeps=True)


def test_a_router_that_chooses_otherwise_may_have_the_loss_and_nothing_is_asked_of_a_dense_model() -> None:
    check_routers(skeleton_of("phimoe"), loss=True, keeps=False)
    check_routers(skeleton_of("qwen3"), loss=False, keeps=False)


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe", "longcat_flash"])
def test_routers_of_no_known_kind_change_nothing_where_nothing_is_asked_of_them(kind: str) -> None:
    hf = small_model(small_config(kind))
    (item,) = ragged([(5, 9)])
    want = PolicyModel(copy.deepcopy(hf), chunk=16, plain=True)(pack([item]), 1.0)[0]
    policy = PolicyModel(hf, chunk=16, plain=True, routing=Routing(find_routers(hf)))
    assert torch.equal(policy(pack([item]), 1.0)[0], want)
    sums = RoutingSums(policy.routing, torch.device("cpu"))
    sums.add()
    assert sums.metrics(sums.totals, 1) == {}


def test_the_sums_of_an_update_are_those_of_its_micro_batches() -> None:
    policy = policy_of(model_of("qwen3_moe"), coef=COEF)
    sums, loads, loss = RoutingSums(policy.routing, torch.device("cpu")), np.zeros((2, 4)), 0.0
    assert sums.metrics(sums.totals, 1) == {}
    assert policy.routing is not None
    for batch in (routed_items()[:2], [], routed_items()[2:]):
        policy(pack(batch), 1.0)
        sums.add()
        if batch:
            assert policy.routing.last is not None
            loss += float(policy.routing.last.loss or 0)
        for item in batch:
            assert item.routes is not None
            loads += [np.bincount(item.routes[:, layer].flatten(), minlength=4) for layer in (0, 1)]
    sums.scale(0.5)
    found = sums.metrics(sums.totals, 2)
    parts = loads / loads.sum(-1, keepdims=True)
    assert found["loss/router"] == pytest.approx(loss / 4)
    assert found["router/load_max"] == pytest.approx(4 * parts.max(-1).mean())
    assert found["router/load_entropy"] == pytest.approx(-(parts * np.log(parts)).sum(-1).mean() / np.log(4))


def test_the_padding_of_routes_is_no_token_and_a_shared_prompt_has_those_of_its_first_sequence() -> None:
    first, second, *_ = (with_routes(item, seed) for seed, item in enumerate(items()))
    assert first.routes is not None
    assert second.routes is not None
    batch = pack([first, second], share_prompts=True)
    assert batch.routes is not None
    assert batch.routes.tolist() == [*first.routes.tolist(), *second.routes[3:].tolist()]
    padded = pack([first, second], padded=True).routes
    assert padded is not None
    assert padded.tolist() == [*first.routes.tolist(), *second.routes.tolist(), [[0, 0], [0, 0]]]
