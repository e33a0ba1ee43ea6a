"""pass@k and cons@k against numbers worked out by hand, and against all draws."""

from __future__ import annotations

import itertools
import math

import pytest

from grpo_ray.telemetry.measures import Estimate, consensus, estimate, pass_at, pass_ks


def test_the_standard_error_is_that_of_the_prompts() -> None:
    got = estimate([1.0, 0.5, 0.0, 0.5])
    assert (got.mean, got.standard_error) == (0.5, pytest.approx(math.sqrt(0.5 / 3 / 4)))
    assert estimate([0.25]) == Estimate(0.25, 0.0)


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (6, 2), (6, 6), (1, 1)])
def test_pass_at_k_is_the_mean_over_all_draws_of_k_samples(n: int, c: int) -> None:
    samples = [i < c for i in range(n)]
    for k in range(1, n + 1):
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert pass_at(k, n, c) == pytest.approx(sum(draws) / len(draws))
    assert pass_at(1, n, c) == pytest.approx(c / n)


@pytest.mark.parametrize(
    ("votes", "right", "value"),
    [
        ([0, 1, 1, 2], [True, False, False, False], 0.0),
        ([0, 1, 1, 2], [False, True, True, False], 1.0),
        ([None, None, None, 4], [False, False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([0, 0, 1, 1, 2], [True, True, False, False, True], 0.5),
        ([2, 1, 0], [True, False, False], pytest.approx(1 / 3)),
    ],
)
def test_the_majority_decides_and_a_tie_counts_in_parts(
    votes: list[float | None], right: list[bool], value: float
) -> None:
    assert consensus(votes, right) == value
    assert consensus(votes[::-1], right[::-1]) == value


def test_pass_at_powers_of_two_and_all_is_told() -> None:
    assert [pass_ks(n) for n in (1, 2, 6, 64)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64]]
