"""Sets of tokens against a plain sort, and the chunked head over them against log_softmax."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from grpo_ray.batch import truncation as module
from grpo_ray.batch.truncation import TokenSets, keep_mask
from grpo_ray.errors import ConfigError
from grpo_ray.models.logprobs import chunked_logprobs
from grpo_ray.types import Truncation
from tests.models.test_logprobs import H, N, V, inputs, plain
from tests.recipes import run_config

SAMPLERS = [
    Truncation(top_p=0.9),
    Truncation(top_k=20),
    Truncation(min_p=0.1),
    Truncation(0.9, 20, 0.1),
    Truncation(0.5, 5, 0.02),
    Truncation(top_p=1e-6),
    Truncation(top_k=1),
    Truncation(min_p=1.0),
    Truncation(0.999, 10_000, 1e-9),
]


@pytest.mark.parametrize("cut", ["top_p=0.9", "top_k=20", "min_p=0.1"])
def test_a_policy_that_is_gone_can_not_be_cut_down_again(cut: str) -> None:
    name, _, value = cut.partition("=")
    with pytest.raises(
        ConfigError, match=rf"rollout.{name} {value} leaves out tokens .*max_staleness 2 .*Use max_stal"
    ):
        run_config(f"rollout.{cut}", "algorithm.max_staleness=2")
    for other in ("num_mini_batches=4", "num_iterations=3", "old_logprobs=rollout", "beta=0.1", "preset=v3_2"):
        assert run_config(f"rollout.{cut}", f"algorithm.{other}").rollout.truncation == f"{name} {value}"
    assert run_config("algorithm.max_staleness=2", "eval.top_p=0.9", "sample.top_p=0.9").rollout.truncation == ""


@pytest.mark.parametrize("section", ["rollout", "eval", "sample"])
def test_a_temperature_that_the_sampler_would_raise_is_refused(section: str) -> None:
    """vLLM samples at 0.01 then, and the learner would divide by what is written."""
    with pytest.raises(ConfigError, match=rf"{section}.temperature 0.005 is below 0.01, which vLLM"):
        run_config(f"{section}.temperature=0.005")
    assert run_config(f"{section}.temperature=0.01")
    if section == "rollout":
        with pytest.raises(ConfigError, match=r"rollout\.temperature"):
            run_config("rollout.temperature=0")
    else:
        assert run_config(f"{section}.temperature=0")


def test_what_top_k_leaves_out_stays_out_where_rounding_keeps_the_sum_below_top_p() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    likeliest = logits.topk(5, dim=1).indices
    mask = keep_mask(logits, likeliest[:, 0], Truncation(top_p=1 - 1e-12, top_k=5))
    assert mask.sum(dim=1).tolist() == [5] * 64
    assert mask.gather(1, likeliest).all()


def plain_set(logits: list[float], t: Truncation) -> set[int]:
    """Token by token, from the likeliest on."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    most = max(logits)
    left = [i for i in order if t.min_p == 0 or math.exp(logits[i] - most) >= t.min_p]
    if 0 < t.top_k < len(left):
        left = [i for i in left if logits[i] >= logits[left[t.top_k - 1]]]
    total = sum(math.exp(logits[i] - most) for i in left)
    before = [0.0, *itertools.accumulate(math.exp(logits[i] - most) / total for i in left)]
    return {i for i, b in zip(left, before, strict=False) if b < t.top_p}


def drawn(logits: Tensor, t: Truncation, g: torch.Generator) -> Tensor:
    """A token of each row's set, the last one of some."""
    sets = [sorted(plain_set(row, t)) for row in logits.tolist()]
    return torch.tensor([s[int(torch.randint(len(s), (), generator=g))] for s in sets])


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, -math.inf)


@pytest.mark.parametrize("t", SAMPLERS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("candidates", [1024, 3])
def test_the_set_is_min_p_then_top_k_then_top_p(
    t: Truncation, scale: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CANDIDATES", candidates)
    g = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(9, 70, generator=g, dtype=torch.float64)
    got = keep_mask(logits, drawn(logits, t, g), t)
    assert [set(row.nonzero()[:, 0].tolist()) for row in got] == [plain_set(row, t) for row in logits.tolist()]


@pytest.mark.parametrize("t", SAMPLERS, ids=str)
def test_ties_at_the_border_keep_the_sampled_token_and_the_sum(t: Truncation) -> None:
    """Logits of a bf16 model have 8 bits: many are equal, and which of them a sort puts first is anybody's guess."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 70, generator=g).mul(2).round().double()
    first = logits.argmax(1)
    base = keep_mask(logits, first, t)
    least = masked(logits, base).masked_fill(~base, math.inf).amin(1, keepdim=True)
    for place in range(5):
        tied = logits == least
        targets = torch.stack([row.nonzero()[place % int(row.sum()), 0] for row in tied])
        got = keep_mask(logits, targets, t)
        assert got.gather(1, targets[:, None]).all()
        torch.testing.assert_close(masked(logits, got).logsumexp(1), masked(logits, base).logsumexp(1))


def test_equally_likely_tokens_are_all_of_the_top_k_on_cpus_and_k_on_gpus() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    t = Truncation(top_k=2)
    assert module._keep(logits, t, False).sum(1).tolist() == [4, 5]
    exact = module._keep(logits, t, True)
    assert exact.sum(1).tolist() == [2, 2]
    for target in range(1, 4):
        mask = module._with_target(exact.clone(), logits, torch.tensor([target, target]))
        assert mask.sum(1).tolist() == [2, 2]
        assert mask[:, target].all()


def test_a_sampled_token_replaces_another_in_rows_alone_where_they_are_tied() -> None:
    tied, apart = [0.4, 0.3, 0.3, 0.0], [0.7, 0.2, 0.1, 0.0]
    # 16 rows are processed two at a time.
    logits = torch.tensor([tied, apart] * 8).log()
    mask = keep_mask(logits, torch.tensor([2, 2] * 8), Truncation(top_p=0.6))
    assert mask.tolist() == [[True, False, True, False], [True, False, True, False]] * 8
    alone = keep_mask(logits, torch.tensor([0, 1] * 8), Truncation(top_p=0.6))
    assert alone.tolist() == [[True, True, False, False], [True, True, False, False]] * 8


def test_a_token_that_rounding_put_outside_is_in_the_set() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert keep_mask(logits, torch.tensor([2]), Truncation(top_k=2)).tolist() == [[True, True, True, False]]
    assert keep_mask(logits, torch.tensor([3]), Truncation(top_p=0.1)).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("t", SAMPLERS, ids=str)
def test_a_model_that_broke_is_not_hidden(t: Truncation) -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        bias[(targets[3] + 1) % V] = math.nan
    logp, _ = chunked_logprobs(hidden, weight, bias, targets, temperature=1.0, chunk=8, sets=TokenSets(t))
    assert logp[3].isnan()


@pytest.mark.parametrize("t", SAMPLERS, ids=str)
@pytest.mark.parametrize(("chunk", "terms"), [(8, "both"), (1000, "logp")])
def test_values_and_gradients_equal_the_plain_ones_over_the_same_set(t: Truncation, chunk: int, terms: str) -> None:
    hidden, weight, bias, _ = inputs(torch.float64)
    g = torch.Generator().manual_seed(1)
    logits = torch.nn.functional.linear(hidden, weight, bias) / 0.7
    targets = drawn(logits.detach(), t, g)
    mask = keep_mask(logits.detach(), targets, t)
    logp = masked(logits, mask).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~mask, 0.0)).sum(-1)
    want = logp.gather(-1, targets[:, None])[:, 0], entropy
    sets = TokenSets(t)
    got = chunked_logprobs(hidden, weight, bias, targets, temperature=0.7, chunk=chunk, sets=sets)
    torch.testing.assert_close(got, want)
    a, b = torch.randn(2, N, generator=g, dtype=torch.float64) * 50

    def total(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (a * pair[0]).sum() * (terms != "entropy") + (b * pair[1]).sum() * (terms != "logp")

    got_grads = torch.autograd.grad(total(got), (hidden, weight, bias), retain_graph=True)
    for x, y in zip(got_grads, torch.autograd.grad(total(want), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(x, y)
    again = torch.autograd.grad(total(got), (hidden, weight, bias))
    assert all(map(torch.equal, got_grads, again))


def test_another_policy_is_renormalised_over_the_first_ones_sets() -> None:
    """A reference, or the policy after a mini-batch: what the first would not have drawn counts for nothing in either."""
    t = Truncation(0.9, 20, 0.0)
    hidden, weight, bias, _ = inputs(torch.float64)
    logits = torch.nn.functional.linear(hidden, weight, bias).detach()
    targets = drawn(logits, t, torch.Generator().manual_seed(2))
    sets = TokenSets(t)
    assert not sets.made
    chunked_logprobs(hidden, weight, bias, targets, temperature=1.0, chunk=8, sets=sets)
    assert sets.made
    other = torch.randn(V, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got, _ = chunked_logprobs(hidden, other, None, targets, temperature=1.0, chunk=8, sets=sets)
    want = masked(hidden @ other.T, keep_mask(logits, targets, t)).log_softmax(-1)
    torch.testing.assert_close(got, want.gather(-1, targets[:, None])[:, 0])
    free, _ = plain(hidden, other, None, targets, 1.0)
    assert (got - free).min() > 0


@pytest.mark.parametrize("density", [0.0, 0.01, 0.03, 0.04, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [1, 7, 8, 1001])
def test_a_set_takes_a_bit_for_each_token_at_most(density: float, vocab: int) -> None:
    mask = torch.rand(31, vocab, generator=torch.Generator().manual_seed(4)) < density
    chunk = module._Chunk.of(mask)
    assert torch.equal(chunk.mask(), mask)
    assert chunk.columns.nbytes <= 31 * -(-vocab // 8)


def test_no_rows_are_no_error() -> None:
    hidden, weight, bias, targets = inputs()
    sets = TokenSets(Truncation(top_k=3))
    logp, entropy = chunked_logprobs(hidden[:0], weight, bias, targets[:0], temperature=1.0, chunk=8, sets=sets)
    assert (len(logp), len(entropy), sets.made) == (0, 0, True)
