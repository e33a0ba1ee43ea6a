"""Plans: nothing lost, nothing over the budget, ranks in step; and packing that keeps neighbours apart."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_ray.batch.pack import PackItem, pack, token_values
from grpo_ray.batch.plan import MiniBatchPlan, plan_batch, shared_cost
from grpo_ray.batch.truncation import TokenSets, keep_mask
from grpo_ray.errors import ConfigError
from grpo_ray.models.attention import (
    FLASH,
    PackedLayout,
    Run,
    attention_kwargs,
    choose_attention,
    packed_attention,
    why_unpackable,
)
from grpo_ray.models.policy import PolicyModel
from grpo_ray.types import Step, Truncation

BUDGET = 100


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    group_sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=10))
    lengths = [draw(st.integers(2, BUDGET)) for size in group_sizes for _ in range(size)]
    groups = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    return lengths, groups, draw(st.integers(1, 4)), draw(st.integers(1, 4))


def make(problem: tuple[list[int], list[int], int, int]) -> list[MiniBatchPlan]:
    lengths, groups, ranks, minis = problem
    return plan_batch(lengths, groups, num_ranks=ranks, num_mini_batches=minis, micro_batch_tokens=BUDGET)


@settings(deadline=None)
@given(problem=problems())
def test_every_sample_is_in_the_plan_once_and_mini_batches_are_whole_groups_in_order(
    problem: tuple[list[int], list[int], int, int],
) -> None:
    lengths, groups, _, minis = problem
    plan = make(problem)
    assert sorted(i for step in plan for rank in step.ranks for micro in rank for i in micro) == list(
        range(len(lengths))
    )
    assert len(plan) == min(minis, len(set(groups)))
    spans = [[groups[i] for i in step.samples] for step in plan]
    for before, after in pairwise(spans):
        assert max(before) < min(after)
    sizes = [len(set(s)) for s in spans]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(problem=problems())
def test_budget_is_kept_and_every_rank_has_as_many_micro_batches(
    problem: tuple[list[int], list[int], int, int],
) -> None:
    lengths, _, ranks, _ = problem
    for step in make(problem):
        assert len(step.ranks) == ranks
        assert len({len(rank) for rank in step.ranks}) == 1
        for rank in step.ranks:
            for micro in rank:
                assert sum(lengths[i] for i in micro) <= BUDGET
                assert [lengths[i] for i in micro] == sorted(lengths[i] for i in micro)


@settings(deadline=None)
@given(problem=problems())
def test_ranks_differ_by_less_than_the_longest_sample(problem: tuple[list[int], list[int], int, int]) -> None:
    lengths = problem[0]
    for step in make(problem):
        tokens = [sum(lengths[i] for micro in rank for i in micro) for rank in step.ranks]
        assert max(tokens) - min(tokens) <= max(lengths[i] for i in step.samples)


@settings(deadline=None)
@given(problem=problems())
def test_the_number_of_micro_batches_is_near_the_least_possible(problem: tuple[list[int], list[int], int, int]) -> None:
    lengths = problem[0]
    for step in make(problem):
        fullest = max(sum(lengths[i] for micro in rank for i in micro) for rank in step.ranks)
        # Two micro-batches that fit into one would be one: more than half of the budget is used, but for the last.
        assert len(step.ranks[0]) <= 2 * fullest / BUDGET + 1


@settings(deadline=None)
@given(problem=problems(), data=st.data())
def test_a_plan_with_shared_prompts_has_every_sample_once_within_the_budget_and_the_samples_of_a_group_side_by_side(
    problem: tuple[list[int], list[int], int, int], data: st.DataObject
) -> None:
    lengths, groups, ranks, minis = problem
    prompt = {
        g: data.draw(st.integers(1, min(n for n, of in zip(lengths, groups, strict=True) if of == g) - 1))
        for g in {*groups}
    }
    prompts = [prompt[g] for g in groups]
    plan = plan_batch(
        lengths, groups, num_ranks=ranks, num_mini_batches=minis, micro_batch_tokens=BUDGET, prompts_S=prompts
    )
    assert [p.samples for p in plan] == [p.samples for p in make(problem)]
    for step in plan:
        assert len({len(rank) for rank in step.ranks}) == 1
        for micro in (micro for rank in step.ranks for micro in rank):
            together = [list(run) for _, run in itertools.groupby(micro, key=lambda i: groups[i])]
            costs = [shared_cost([lengths[i] for i in run], prompts[run[0]]) for run in together]
            assert sum(costs) <= BUDGET
    if ranks == 1:
        # No group is in two units, unless it is over the budget.
        for g in {*groups}:
            members = [i for i in range(len(lengths)) if groups[i] == g]
            if shared_cost([lengths[i] for i in members], prompt[g]) <= BUDGET:
                micros = [m for step in plan for micro in step.ranks for m in micro if {*m} & {*members}]
                assert len(micros) == 1


def test_groups_are_split_over_ranks_as_far_as_balance_asks_for() -> None:
    def ranks_of_groups(num_groups: int, ranks: int) -> list[int]:
        groups = [g for g in range(num_groups) for _ in range(8)]
        lengths = [30 + 20] * len(groups)
        (step,) = plan_batch(
            lengths, groups, num_ranks=ranks, num_mini_batches=1, micro_batch_tokens=1000, prompts_S=[30] * len(groups)
        )
        where = [
            {r for r, rank in enumerate(step.ranks) for m in rank for i in m if groups[i] == g}
            for g in range(num_groups)
        ]
        return [len(w) for w in where]

    assert ranks_of_groups(4, 2) == [1, 1, 1, 1]
    assert ranks_of_groups(1, 2) == [2]
    assert ranks_of_groups(3, 2) == [2, 2, 2]
    assert ranks_of_groups(1, 8) == [8]


def test_the_same_batch_gives_the_same_plan() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, BUDGET, 200).tolist()
    groups = [i // 8 for i in range(200)]
    assert make((lengths, groups, 3, 2)) == make((lengths, groups, 3, 2))


def test_a_sample_over_the_budget_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"sample 1 .* 101 tokens.*micro_batch_tokens \(100\)"):
        plan_batch([5, 101], [0, 0], num_ranks=1, num_mini_batches=1, micro_batch_tokens=BUDGET)


def item(prompt: list[int], completion: list[int], sample: int = 0) -> PackItem:
    return PackItem(
        np.array(prompt),
        np.array(completion),
        np.arange(len(completion), dtype=np.float32) + sample,
        0.5 + sample,
        0.25,
        sample,
    )


def test_packing_lays_sequences_end_to_end_without_their_last_token() -> None:
    p = pack([item([1, 2], [3, 4]), item([5], [6, 7, 8], sample=1)])
    assert p.input_ids.tolist() == [1, 2, 3, 5, 6, 7]
    assert p.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert p.lengths == [3, 3]
    assert p.target_rows.tolist() == [1, 2, 3, 4, 5]
    assert p.targets.tolist() == [3, 4, 6, 7, 8]
    assert p.samples.tolist() == [0, 0, 1, 1, 1]
    assert p.segments.tolist() == [0, 0, 1, 1, 1]
    assert p.advantages.tolist() == [0.5, 0.5, 1.5, 1.5, 1.5]
    assert p.rollout_logprobs.tolist() == [0, 1, 1, 2, 3]


def test_padding_comes_after_each_sequence_and_is_no_target() -> None:
    items = [item([1, 2], [3, 4]), item([5], [6, 7, 8, 9], sample=1)]
    p = pack(items, padded=True)
    assert p.input_ids.tolist() == [1, 2, 3, 0, 5, 6, 7, 8]
    assert p.lengths == [4, 4]
    assert p.target_rows.tolist() == [1, 2, 4, 5, 6, 7]
    assert p.targets.tolist() == pack(items).targets.tolist()


def test_neighbours_with_the_same_prompt_have_it_once() -> None:
    items = [item([1, 2], [3, 4, 5]), item([1, 2], [6], 1), item([1, 2], [7, 8], 2), item([9], [1, 2], 3)]
    p, apart = pack(items, share_prompts=True), pack(items)
    assert p.input_ids.tolist() == [1, 2, 3, 4, 7, 9, 1]
    assert p.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert p.lengths == [2, 2, 1, 2]
    assert p.sequences == [(0, 1), (0,), (0, 2), (3,)]
    assert p.target_rows.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    for name in ("targets", "samples", "segments", "advantages", "rollout_logprobs", "weights"):
        assert getattr(p, name).tolist() == getattr(apart, name).tolist()
    assert (p.num_inputs, p.num_tokens) == (7, 11)
    assert (apart.num_inputs, apart.num_tokens) == (11, 11)


@settings(deadline=None)
@given(problem=problems())
def test_padded_micro_batches_keep_the_budget_with_their_padding(
    problem: tuple[list[int], list[int], int, int],
) -> None:
    lengths, groups, ranks, minis = problem
    plan = plan_batch(lengths, groups, num_ranks=ranks, num_mini_batches=minis, micro_batch_tokens=BUDGET, padded=True)
    micros = [m for step in plan for rank in step.ranks for m in rank]
    assert sorted(i for m in micros for i in m) == list(range(len(lengths)))
    assert all(len(m) * max(lengths[i] for i in m) <= BUDGET for m in micros if m)
    assert all(len({len(rank) for rank in step.ranks}) == 1 for step in plan)


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=9), ranks=st.integers(1, 3))
def test_the_fullest_rank_is_within_a_twentieth_of_the_best_possible(lengths: list[int], ranks: int) -> None:
    (step,) = plan_batch(lengths, [0] * len(lengths), num_ranks=ranks, num_mini_batches=1, micro_batch_tokens=BUDGET)
    fullest = max(sum(lengths[i] for micro in rank for i in micro) for rank in step.ranks)
    loads = [
        [sum(n for n, r in zip(lengths, places, strict=True) if r == rank) for rank in range(ranks)]
        for places in itertools.product(range(ranks), repeat=len(lengths))
    ]
    assert fullest <= 1.05 * min(map(max, loads))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("num", [32, 64, 128, 512])
def test_heavy_tailed_samples_are_spread_within_a_twentieth_of_even(num: int, ranks: int) -> None:
    for seed in range(5):
        lengths = np.clip(np.random.default_rng(seed).lognormal(4.2, 0.7, num), 16, 512).astype(int).tolist()
        (step,) = plan_batch(lengths, list(range(num)), num_ranks=ranks, num_mini_batches=1, micro_batch_tokens=1024)
        fullest = max(sum(lengths[i] for micro in rank for i in micro) for rank in step.ranks)
        assert fullest <= 1.05 * max(sum(lengths) / ranks, max(lengths))


@settings(deadline=None)
@given(problem=problems(), data=st.data())
def test_idle_samples_stay_members_of_their_mini_batch_and_are_in_no_micro_batch(
    problem: tuple[list[int], list[int], int, int], data: st.DataObject
) -> None:
    lengths, groups, ranks, minis = problem
    idle = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    plan = plan_batch(lengths, groups, num_ranks=ranks, num_mini_batches=minis, micro_batch_tokens=BUDGET, idle=idle)
    assert [p.samples for p in plan] == [p.samples for p in make(problem)]
    computed = [i for p in plan for rank in p.ranks for micro in rank for i in micro]
    assert sorted(computed) == sorted(set(range(len(lengths))) - idle)
    assert all(len({len(rank) for rank in p.ranks}) == 1 for p in plan)


def test_nothing_packed_is_a_dummy_of_no_weight() -> None:
    p = pack([])
    assert p.is_dummy
    assert p.num_tokens == 0
    assert p.weights.tolist() == [0.0]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PolicyModel:
    implementation = choose_attention("sdpa", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=implementation)
    return PolicyModel(hf, chunk=16).eval()


def random_items(seed: int = 0) -> list[PackItem]:
    rng = np.random.default_rng(seed)
    sizes = [(4, 9), (7, 6), (1, 1), (3, 30), (12, 1), (5, 8)]
    return [
        item(rng.integers(8, 200, n).tolist(), rng.integers(8, 200, t).tolist(), i) for i, (n, t) in enumerate(sizes)
    ]


def items_of_groups(seed: int = 0) -> list[PackItem]:
    """Groups of three, one and four; the completions of the last are of one token and more."""
    rng = np.random.default_rng(seed)
    sizes = [(4, (9, 6, 9)), (7, (5,)), (3, (1, 30, 1, 8))]
    prompts = [rng.integers(8, 200, n).tolist() for n, _ in sizes]
    pairs = [(prompt, t) for prompt, (_, lengths) in zip(prompts, sizes, strict=True) for t in lengths]
    return [item(prompt, rng.integers(8, 200, t).tolist(), i) for i, (prompt, t) in enumerate(pairs)]


LAID_OUT = pytest.mark.parametrize(
    ("items", "options"),
    [
        pytest.param(random_items(), {}, id="packed"),
        pytest.param(random_items(), {"padded": True}, id="padded"),
        pytest.param(items_of_groups(), {"share_prompts": True}, id="shared"),
    ],
)


@LAID_OUT
@pytest.mark.parametrize("truncation", [Truncation(), Truncation(0.9, 50, 0.01)], ids=["all", "truncated"])
@torch.no_grad()
def test_log_probabilities_are_those_of_plain_transformers(
    policy: PolicyModel, tiny_model: Path, items: list[PackItem], options: dict[str, bool], truncation: Truncation
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    want = []
    for i in items:
        ids = torch.from_numpy(np.concatenate([i.prompt_ids, i.completion_ids]))[None]
        logits = (plain(ids, use_cache=False).logits[0] / 0.8)[len(i.prompt_ids) - 1 : -1]
        targets = torch.from_numpy(i.completion_ids)
        kept = logits.masked_fill(~keep_mask(logits, targets, truncation), -torch.inf)
        want.append(kept.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    sets = TokenSets(truncation) if truncation.any else None
    got, _ = policy(pack(items, **options), 0.8, sets)
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-5)


@LAID_OUT
@torch.no_grad()
def test_changing_one_completion_changes_no_other(
    policy: PolicyModel, items: list[PackItem], options: dict[str, bool]
) -> None:
    batch = pack(items, **options)
    before, _ = policy(batch, 1.0)
    for changed in range(len(items)):
        other = [*items]
        other[changed] = item(items[changed].prompt_ids.tolist(), (items[changed].completion_ids + 1).tolist(), changed)
        after, _ = policy(pack(other, **options), 1.0)
        mine = torch.from_numpy(batch.samples == changed)
        assert (after - before)[~mine].abs().max() <= 1e-6
        assert (after - before)[mine].abs().max() > 1e-3


@torch.no_grad()
def test_changing_one_sample_changes_no_other(policy: PolicyModel) -> None:
    items = random_items()
    before, _ = policy(pack(items), 1.0)
    for changed in range(len(items)):
        other = [*items]
        other[changed] = item(
            (items[changed].prompt_ids + 1).tolist(), (items[changed].completion_ids + 1).tolist(), changed
        )
        after, _ = policy(pack(other), 1.0)
        mine = torch.from_numpy(pack(items).samples == changed)
        assert (after - before)[~mine].abs().max() <= 1e-6
        assert (after - before)[mine].abs().max() > 1e-3


def test_the_gradient_with_shared_prompts_is_that_of_sequences_by_themselves(tiny_model: Path) -> None:
    implementation = choose_attention("sdpa", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation=implementation)
    model = PolicyModel(hf, chunk=16)

    def gradient(share_prompts: bool) -> torch.Tensor:
        batch = pack(items_of_groups(), share_prompts=share_prompts)
        logp_C, _ = model(batch, 1.0)
        model.zero_grad()
        (logp_C * torch.from_numpy(batch.rollout_logprobs)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want, got = gradient(False), gradient(True)
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_attention_over_shared_parts_is_that_of_each_sequence_alone(window: int | None) -> None:
    torch.manual_seed(0)
    lengths, sequences = [5, 3, 8, 4, 2], [(0, 1), (0, 2), (3,), (0,), (0, 4)]
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2))
    layout = PackedLayout.of(lengths, sequences)
    got, _ = packed_attention(torch.nn.Module(), q, k, v, None, packed_layout=layout, sliding_window=window)
    rows = torch.arange(sum(lengths)).split(lengths)
    for parts in sequences:
        own = torch.cat([rows[part] for part in parts])
        n = len(own)
        may = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n))
        keys, values = (x[:, :, own].repeat_interleave(2, dim=1) for x in (k, v))
        scores = (q[:, :, own] @ keys.transpose(2, 3) / 8**0.5).masked_fill(~may, float("-inf"))
        torch.testing.assert_close(got[:, own], (scores.softmax(-1) @ values).transpose(1, 2))


def test_sequences_of_equal_length_are_attended_as_one_batch() -> None:
    apart = PackedLayout.of([3, 5, 5, 5, 9], [(0,), (1,), (2,), (3,), (4,)])
    assert apart == PackedLayout([3, 15, 9], [Run(1, 3, (0,)), Run(3, 5, (1,)), Run(1, 9, (2,))])
    shared = PackedLayout.of([2, 4, 1, 4, 3], [(0, 1), (0, 2), (0, 3), (4,)])
    assert shared == PackedLayout([2, 4, 1, 4, 3], [Run(2, 3, (0, 2, 4)), Run(2, 6, (0, 1, 0, 3))])


def test_flash_attention_refuses_shared_prompts() -> None:
    with pytest.raises(ValueError, match=r"share a prompt; set learner\.share_prompts to false"):
        attention_kwargs([2, 3, 4], [(0, 1), (0, 2)], FLASH, torch.device("cpu"))
    kwargs = attention_kwargs([2, 3, 4], [(0,), (1,), (2,)], FLASH, torch.device("cpu"))
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 2, 5, 9]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has layers of conv"),
        ("mamba", {}, "has layers of linear_attention"),
        ("falcon", {}, "layers that do not use Transformers' attention interface"),
    ],
)
def test_a_model_with_more_than_attention_between_its_tokens_does_not_pack(
    kind: str, values: dict[str, Any], expected: str
) -> None:
    small = {"hidden_size": 56, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **heads | values))
    reason = why_unpackable(model)
    assert reason is not None
    assert expected in reason


def test_flash_attention_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attention_2, which needs a GPU"):
        choose_attention("flash_attention_2", torch.device("cpu"))


def test_tokens_may_have_advantages_of_their_own() -> None:
    def item(advantage: Any, sample: int) -> PackItem:
        return PackItem(np.arange(2), np.arange(4), np.zeros(4, np.float32), advantage, 1.0, sample)

    steps = (Step(0, 0.5), Step(2, -1.5))
    packed = pack([item(token_values(steps, 4), 0), item(2.0, 1)])
    assert packed.advantages.tolist() == [0.5, -1.5, -1.5, 0.0, 2.0, 2.0, 2.0, 2.0]
    assert packed.advantages.dtype == np.float32


def test_a_plan_is_told_by_other_numbers() -> None:
    plan = MiniBatchPlan((((0, 2), (1,)), ((3,), ())), idle=(4,))
    assert plan.of_pairs() == MiniBatchPlan((((0, 1, 4, 5), (2, 3)), ((6, 7), ())), idle=(8, 9))
    assert plan.renumbered([7, 5, 3, 1, 0]) == MiniBatchPlan((((7, 3), (5,)), ((1,), ())), idle=(0,))
