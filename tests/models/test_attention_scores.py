"""Sinks and capped scores in packed attention, against Transformers' own eager attention and against each sequence alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_ray.batch.pack import pack
from grpo_ray.models import attention
from grpo_ray.models.attention import PackedLayout, packed_attention
from grpo_ray.models.features import attention_scores
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.varlen import VarlenLayout
from tests.models.random_models import gradients, own_logps, ragged, random_model

LENGTHS = [5, 3, 8, 4, 2]
SEQUENCES = [(0, 1), (0, 2), (3,), (0,), (0, 4)]
ITEMS = ragged([(3, 5), (1, 9), (4, 12), (3, 5)])


def alone(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None, sinks: Tensor | None) -> Tensor:
    """The attention [n, heads, D] of one sequence [heads, n, D], by its formula."""
    n = q.shape[1]
    scores = 0.4 * q @ k.repeat_interleave(2, 0).transpose(1, 2)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    may = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n))
    scores = scores.masked_fill(~may, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
    return (scores.softmax(-1)[..., :n] @ v.repeat_interleave(2, 0)).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize(("cap", "sinks"), [(None, True), (1.5, False), (1.5, True)])
@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
def test_output_and_gradients_are_those_of_each_sequence_alone(
    window: int | None, cap: float | None, sinks: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_scores, "_SCORES", at_once)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(heads, sum(LENGTHS), 6, dtype=torch.float64, generator=g).requires_grad_() for heads in (4, 2, 2)
    )
    s = torch.randn(4, dtype=torch.float64, generator=g).requires_grad_() if sinks else None
    given = [x for x in (q, k, v, s) if x is not None]
    got, _ = packed_attention(
        nn.Module(),
        q[None],
        k[None],
        v[None],
        None,
        scaling=0.4,
        packed_layout=PackedLayout.of(LENGTHS, SEQUENCES),
        sliding_window=window,
        s_aux=s,
        softcap=cap,
    )
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    want = torch.zeros_like(got[0])
    for parts in SEQUENCES:
        own = torch.cat([rows[part] for part in parts])
        want = want.index_put((own,), alone(q[:, own], k[:, own], v[:, own], window, cap, s))
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=g)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(
        torch.autograd.grad((got[0] * upstream).sum(), given), torch.autograd.grad((want * upstream).sum(), given)
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
        ("gemma2", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 4}),
        ("vaultgemma", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    ],
)
def test_a_packed_model_computes_what_its_own_eager_attention_does(kind: str, options: dict[str, Any]) -> None:
    plain = random_model(kind, attention="eager", dtype=torch.float32, **options)
    want = own_logps(plain, ITEMS)
    policy = PolicyModel(random_model(kind, dtype=torch.float32, **options), chunk=8)
    got, _ = policy(pack(ITEMS, share_prompts=True), 1.0)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    got_gradients, want_gradients = gradients(policy, got), gradients(plain, want)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        assert (got_gradients[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), torch.tensor(1e-2)), name
    if kind == "gpt_oss":
        assert float(want_gradients["model.layers.0.self_attn.sinks"].norm()) > 1e-3


@pytest.mark.parametrize("option", [{"s_aux": torch.zeros(4)}, {"softcap": 2.0}])
def test_the_gpus_kernel_is_not_given_what_it_lacks(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_kernel", lambda query, dropout: True)
    called: list[int] = []

    def kernel(query: Tensor, *_: Any) -> Tensor:
        called.append(1)
        return query

    monkeypatch.setattr(attention, "varlen_attention", kernel)
    q, k, v = (torch.randn(1, heads, 8, 8) for heads in (4, 2, 2))
    layout = replace(
        PackedLayout.of([3, 5], [(0,), (1,)]), varlen=VarlenLayout.of([3, 5], [(0,), (1,)], torch.device("cpu"))
    )
    packed_attention(nn.Module(), q, k, v, None, packed_layout=layout, **option)
    assert called == []
    packed_attention(nn.Module(), q, k, v, None, packed_layout=layout)
    assert called == [1]


@pytest.mark.parametrize("option", ["position_bias", "indices", "block_indices"])
def test_attention_with_more_than_scores_is_refused(option: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    odd: dict[str, Any] = {option: q}
    with pytest.raises(ValueError, match=f"uses {option}: not supported"):
        packed_attention(nn.Module(), q, k, v, None, packed_layout=PackedLayout.of([4], [(0,)]), **odd)
