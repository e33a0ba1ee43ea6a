"""Batch plans: samples -> mini-batches -> learner ranks -> micro-batches. Pure and deterministic: every rank makes the same plan.

S samples of a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from grpo_ray.errors import ConfigError

_NEAR_BEST = 1.05
_SEARCHED = 64
"""The most samples for which a search is worthwhile. With more, longest-first is within 5% unless a few are far longer than all
others."""
_NODES = 20_000
_ATTENTION_COPY = 8
"""The number of a shared prompt's tokens recomputed by attention alone that cost as much as one token of a whole layer:
attention keeps 4 of the about 34 vectors of a token that a layer keeps for its backward pass (queries, keys, values and the
output)."""

MicroBatch = tuple[int, ...]
"""Indices into the samples, by length or, where they share prompts, group by group; empty where a rank has less to compute."""


@dataclass(frozen=True)
class MiniBatchPlan:
    """One optimizer step: `ranks[r]` are the micro-batches of rank r, equally many on each."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    idle: tuple[int, ...] = ()
    """Samples that count in the step's normalizers and add nothing to its gradient: no rank computes them."""

    @property
    def samples(self) -> list[int]:
        return sorted([*self.idle, *(i for rank in self.ranks for micro in rank for i in micro)])

    def of_pairs(self) -> MiniBatchPlan:
        """The plan with samples 2i and 2i + 1 in the place of pair i."""
        ranks = tuple(tuple(tuple(2 * i + k for i in micro for k in (0, 1)) for micro in rank) for rank in self.ranks)
        return MiniBatchPlan(ranks, tuple(2 * i + k for i in self.idle for k in (0, 1)))

    def renumbered(self, names: Sequence[int]) -> MiniBatchPlan:
        """The plan with `names[i]` in the place of i."""
        ranks = tuple(tuple(tuple(names[i] for i in micro) for micro in rank) for rank in self.ranks)
        return MiniBatchPlan(ranks, tuple(names[i] for i in self.idle))


def plan_batch(
    lengths_S: Sequence[int],
    groups_S: Sequence[int],
    *,
    num_ranks: int,
    num_mini_batches: int,
    micro_batch_tokens: int,
    padded: bool = False,
    prompts_S: Sequence[int] | None = None,
    idle: Set[int] = frozenset(),
) -> list[MiniBatchPlan]:
    """Split a batch into mini-batches of whole groups, in order; each mini-batch over ranks, and each rank's part into
    micro-batches, balanced by tokens.

    Where a group's prompt is computed once for all of a micro-batch, groups are split over ranks only as far as balance requires.

    Unequal numbers of micro-batches would deadlock DeepSpeed's ranks, so the shorter lists are
    filled with empty ones.

    Args:
        lengths_S: [S] tokens, prompt and completion.
        groups_S: [S] number of each sample's group; groups come in the order in which they first appear.
        num_ranks: the number of learner ranks.
        num_mini_batches: optimizer steps in one pass; fewer come back when there are fewer groups.
        micro_batch_tokens: most tokens of one micro-batch, padding included.
        padded: sequences of a micro-batch are filled up to its longest, so each holds sequences of similar length.
        prompts_S: [S] tokens that a sample shares with the others of its group in a micro-batch; None: nothing is shared.
        idle: samples that need no pass; they still belong to their mini-batch.

    Raises:
        ConfigError: a single sample is longer than `micro_batch_tokens`.
    """
    for i, length in enumerate(lengths_S):
        if length > micro_batch_tokens:
            raise ConfigError(
                f"sample {i} of the batch has {length} tokens, more than learner.micro_batch_tokens "
                f"({micro_batch_tokens}); raise it, or lower data.max_prompt_length or rollout.max_completion_length"
            )
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups_S):
        members.setdefault(group, []).append(i)
    in_order = list(members.values())
    count = min(num_mini_batches, len(in_order))
    cuts = [len(in_order) * k // count for k in range(count + 1)] if count else []
    return [
        _plan_mini_batch(in_order[a:b], lengths_S, num_ranks, micro_batch_tokens, padded, prompts_S, idle)
        for a, b in pairwise(cuts)
    ]


def _plan_mini_batch(
    groups: list[list[int]],
    lengths_S: Sequence[int],
    num_ranks: int,
    budget: int,
    padded: bool,
    prompts_S: Sequence[int] | None,
    idle: Set[int],
) -> MiniBatchPlan:
    computed = [[i for i in group if i not in idle] for group in groups]
    if prompts_S is None:
        units = [[i] for group in computed for i in group]
        costs = [lengths_S[i] for (i,) in units]
        per_rank = _balance(range(len(units)), costs, num_ranks)
    else:
        units, costs, per_rank = _balance_shared(computed, lengths_S, prompts_S, num_ranks, budget)
    count = max(1, *(-(-sum(costs[u] for u in part) // budget) for part in per_rank))
    fill = _pad_into if padded else _pack_into
    while True:
        packed = [fill(part, costs, count, budget) for part in per_rank]
        if all(p is not None for p in packed):
            break
        count += 1

    def in_order(micro: list[int]) -> MicroBatch:
        return tuple(i for u in sorted(micro, key=lambda u: (costs[u], units[u])) for i in units[u])

    return MiniBatchPlan(
        tuple(tuple(map(in_order, p)) for p in packed if p is not None),
        tuple(i for group in groups for i in group if i in idle),
    )


def shared_cost(lengths: Sequence[int], prompt: int) -> int:
    """The cost in tokens of sequences that share a prompt: the prompt once, and attention's copies of it at their own cost."""
    repeated = (len(lengths) - 1) * prompt
    return sum(lengths) - repeated + repeated // _ATTENTION_COPY


def _balance_shared(
    groups: list[list[int]], lengths_S: Sequence[int], prompts_S: Sequence[int], num_ranks: int, budget: int
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Cut groups into units that are computed together, as few as balance over the ranks and the budget allow.

    Returns:
        Samples of each unit, its cost in tokens, and the units of each rank.
    """
    best: tuple[int, tuple[list[list[int]], list[int], list[list[int]]]] | None = None
    cuts, finest = 1, max(map(len, groups))
    while True:
        units = [unit for group in groups if group for unit in _cut(group, lengths_S, prompts_S, cuts, budget)]
        costs = [shared_cost([lengths_S[i] for i in unit], prompts_S[unit[0]]) for unit in units]
        per_rank = _balance(range(len(units)), costs, num_ranks)
        fullest = max(sum(costs[u] for u in part) for part in per_rank)
        if best is None or fullest < best[0]:
            best = fullest, (units, costs, per_rank)
        if cuts >= finest or fullest * num_ranks <= sum(costs) * _NEAR_BEST:
            return best[1]
        cuts *= 2


def _cut(
    group: list[int], lengths_S: Sequence[int], prompts_S: Sequence[int], cuts: int, budget: int
) -> list[list[int]]:
    """Cut a group into `cuts` units of even size; into more, if one would be over the budget."""
    for count in range(min(cuts, len(group)), len(group)):
        units = _spread(group, lengths_S, count)
        if all(shared_cost([lengths_S[i] for i in u], prompts_S[group[0]]) <= budget for u in units):
            return units
    return [[i] for i in group]


def _spread(samples: Sequence[int], lengths_S: Sequence[int], num_bins: int) -> list[list[int]]:
    """Assign the longest first, each to the bin with the fewest tokens: at most 4/3 of the best possible largest bin (Graham
    1969)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, k) for k in range(num_bins)]
    for i in sorted(samples, key=lambda i: (-lengths_S[i], i)):
        tokens, k = heap[0]
        bins[k].append(i)
        heapq.heapreplace(heap, (tokens + lengths_S[i], k))
    return bins


def _balance(samples: Sequence[int], lengths_S: Sequence[int], num_bins: int) -> list[list[int]]:
    """Assign like `_spread`; where that may be more than 5% above the best possible (few samples of uneven length), search until
    it is not, or the search budget is spent, which takes tens of milliseconds."""
    bins = _spread(samples, lengths_S, num_bins)
    longest = sorted((lengths_S[i] for i in samples), reverse=True)
    # No bin can be shorter than the mean, the longest sample, or the two shortest of those that cannot all have a bin of their own.
    least = max(
        -(-sum(longest) // num_bins),
        *longest[:1],
        sum(longest[num_bins - 1 : num_bins + 1]) * (len(longest) > num_bins),
    )
    good = least * _NEAR_BEST
    fullest = max(sum(lengths_S[i] for i in b) for b in bins)
    if fullest <= good or len(samples) > _SEARCHED:
        return bins
    order = sorted(samples, key=lambda i: (-lengths_S[i], i))
    loads, place, nodes = [0] * num_bins, [0] * len(order), 0

    def search(n: int) -> None:
        """Place the samples from the n-th on, at first as LPT would; keep the best result."""
        nonlocal fullest, bins, nodes
        if n == len(order):
            fullest = max(loads)
            bins = [[i for i, b in zip(order, place, strict=True) if b == k] for k in range(num_bins)]
            return
        tried: set[int] = set()
        for k in sorted(range(num_bins), key=loads.__getitem__):
            after = loads[k] + lengths_S[order[n]]
            if loads[k] in tried or after >= fullest or fullest <= good or nodes > _NODES:
                continue
            tried.add(loads[k])
            nodes += 1
            place[n], loads[k] = k, after
            search(n + 1)
            loads[k] = after - lengths_S[order[n]]

    search(0)
    return bins


def _pack_into(samples: Sequence[int], lengths_S: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """Pack into `count` micro-batches within the budget: of even size if that fits, else best-fit; None if neither does."""
    bins = _spread(samples, lengths_S, count)
    if max(sum(lengths_S[i] for i in b) for b in bins) <= budget:
        return bins
    bins = [[] for _ in range(count)]
    room = [budget] * count
    for i in sorted(samples, key=lambda i: (-lengths_S[i], i)):
        fitting = [k for k in range(count) if room[k] >= lengths_S[i]]
        if not fitting:
            return None
        k = min(fitting, key=lambda k: room[k])
        bins[k].append(i)
        room[k] -= lengths_S[i]
    return bins


def _pad_into(samples: Sequence[int], lengths_S: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """Pack into `count` runs of the samples by length; None if one of them is over the budget when padded to its longest."""
    in_order = sorted(samples, key=lambda i: (lengths_S[i], i))
    cuts = [len(in_order) * k // count for k in range(count + 1)]
    bins = [in_order[a:b] for a, b in pairwise(cuts)]
    return bins if all(not b or len(b) * lengths_S[b[-1]] <= budget for b in bins) else None
