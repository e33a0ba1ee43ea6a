"""How evenly a plan spreads tokens over ranks, and into how few micro-batches: by small numbers."""

from __future__ import annotations

import pytest

from grpo_ray.batch.plan import MiniBatchPlan, plan_batch, shared_cost


def plan_of(lengths: list[int], ranks: int, budget: int) -> MiniBatchPlan:
    (step,) = plan_batch(lengths, [0] * len(lengths), num_ranks=ranks, num_mini_batches=1, micro_batch_tokens=budget)
    return step


def loads(lengths: list[int], ranks: int) -> list[int]:
    step = plan_of(lengths, ranks, budget=10_000)
    return sorted(sum(lengths[i] for micro in rank for i in micro) for rank in step.ranks)


@pytest.mark.parametrize(
    ("lengths", "ranks", "expected"),
    [
        pytest.param([35, 14, 27, 16, 31], 2, [58, 65], id="of-the-mean-in-whole-tokens"),
        pytest.param([21, 39, 11, 22, 9, 9], 3, [32, 39, 40], id="of-the-longest-sample"),
        pytest.param([25, 10, 14, 40, 24, 23], 3, [40, 47, 49], id="of-two-that-must-share-a-rank"),
        pytest.param([18, 11, 20, 10, 17], 2, [37, 39], id="found-by-a-search-that-begins-with-the-longest"),
    ],
)
def test_balance_is_good_enough_within_a_twentieth_of_what_no_plan_can_beat(
    lengths: list[int], ranks: int, expected: list[int]
) -> None:
    assert loads(lengths, ranks) == expected


def test_many_samples_are_spread_longest_first_without_a_search() -> None:
    assert loads([3000, 3000, 2000, 2000, 2000, *[1] * 1100], 2) == [6100, 7000]


@pytest.mark.parametrize(
    ("lengths", "budget", "fewest"),
    [
        pytest.param([6, 3, 3, 5, 7], 12, 2, id="room-that-a-sample-fills-exactly"),
        pytest.param([9, 8, 7, 5, 9], 20, 2, id="longest-first"),
        pytest.param([4, 18, 28, 15, 30, 12, 5, 7], 40, 3, id="the-fullest-that-has-room"),
    ],
)
def test_samples_that_do_not_fit_evenly_are_packed_where_they_fit_best(
    lengths: list[int], budget: int, fewest: int
) -> None:
    (micros,) = plan_of(lengths, 1, budget).ranks
    assert len(micros) == fewest == -(-sum(lengths) // budget)


def test_a_shared_prompt_costs_its_tokens_once_and_an_eighth_for_each_copy() -> None:
    assert shared_cost([50], 30) == 50
    assert shared_cost([50] * 8, 30) == 30 + 8 * 20 + 7 * 30 // 8


def test_groups_are_cut_no_further_where_that_balances_no_better() -> None:
    lengths, groups = [6, 2, 5, 3, 6, 2], [0, 0, 1, 1, 1, 5]
    (step,) = plan_batch(
        lengths, groups, num_ranks=2, num_mini_batches=1, micro_batch_tokens=6, prompts_S=[1, 1, 2, 2, 2, 1]
    )
    assert step.ranks == (((0,), (2, 3)), ((4,), (1, 5)))
