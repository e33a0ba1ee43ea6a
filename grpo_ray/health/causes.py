"""Explanations of a step without signal: the symptom, and the options or columns that would change it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.health.applicable import why_not_applicable
from grpo_ray.health.tally import Moments, Tally
from grpo_ray.health.untrained import EMPTY, NO_GRADIENT, NO_SIGNAL, NOT_APPLICABLE, TRUNCATED

MOST = 0.9
"""The fraction of the completions that counts as nearly all."""


def why_no_signal(
    config: RunConfig, step: int, tally: Tally, untrained: Mapping[str, str], before: Sequence[Tally]
) -> tuple[str, str]:
    """Return a name for the cause, and its description with the fix.

    Args:
        step: the step; the first is 1.
        untrained: the result of `why_untrained`.
        before: the tallies of the steps before.
    """
    rewards, total = tally.rewards, tally.samples
    if not rewards.count:
        why = _why_not_applicable(config, step, tally)
        return NOT_APPLICABLE, f"no reward applies to any of the {total} samples, so nothing is trained: {why}"
    if rewards.flat:
        scored = tally.of_samples.count
        why = _why_not_applicable(config, step, tally) if scored < total else ""
        silent = f"; {total - scored} samples have none: {why}" if why else ""
        return "equal", f"all {scored} rewards are {rewards.highest:g}, {_why_equal(config, tally, before)}{silent}"
    if not tally.with_spread:
        return "no_spread", f"nothing is trained: {_why_no_spread(config, tally)}"
    reasons = set(untrained.values()) - {NO_SIGNAL, NOT_APPLICABLE}
    if reasons == {TRUNCATED}:
        limit = config.rollout.max_completion_length
        return TRUNCATED, (
            f"nothing is trained: {tally.cut} of {total} completions were cut at rollout.max_completion_length ({limit}), and "
            "algorithm.mask_truncated leaves those out of the loss; raise the first, or set the second to false"
        )
    if NO_GRADIENT in reasons:
        return NO_GRADIENT, f"the gradient is 0 though rewards differ: {_why_no_gradient(config.algorithm)}"
    return EMPTY, f"nothing is trained: {tally.empty} of {total} completions are empty, and what differs is among them"


def after_a_fall(config: RunConfig) -> str:
    """The advice for a run that has lost an ability."""
    return (
        f"the policy has broken down, or prompts have changed. Lower learner.learning_rate ({config.learner.learning_rate:g}), and "
        "go on from an earlier checkpoint or begin anew"
    )


def _why_not_applicable(config: RunConfig, step: int, tally: Tally) -> str:
    told = []
    for function in config.reward.functions:
        of = tally.functions.get(function.title)
        if of is not None and of.columns is not None:
            told.append(why_not_applicable(function, of.columns, step - 1))
    return "; ".join(told) or "no reward function gave a number"


def _why_equal(config: RunConfig, tally: Tally, before: Sequence[Tally]) -> str:
    if tally.failed == tally.samples:
        value = config.reward.on_failure.value
        return f"since every score failed and counts as that: see reward.on_failure (value {value:g}) and logs/reward-0.log"
    right, was_right = tally.right, Moments.pooled(t.right for t in before)
    if right.count and right.mean == 1:
        return (
            "every answer is right: as far as its rewards can tell this task is solved, and there is nothing left to learn from "
            "it. Use harder prompts, or end the run"
        )
    if right.count and right.mean == 0 < was_right.mean:
        return f"where {was_right.mean:.1%} of the answers were right in the steps before: {after_a_fall(config)}"
    limit, num_cut = config.rollout.max_completion_length, tally.cut
    cut = num_cut >= MOST * tally.samples
    also = (
        f" {num_cut} of {tally.samples} were cut at rollout.max_completion_length ({limit}): raise that first."
        if cut
        else ""
    )
    if tally.rewards.highest == 0:
        return (
            f"so no answer is better than another, and nothing is trained.{also} Read samples in rollouts/ or report.html: is the "
            "right answer there, and in the form that the reward asks for? If it never is: easier prompts, a cold start (grpo-ray "
            "sft), or a larger rollout.num_generations"
        )
    names = ", ".join(f.title for f in config.reward.functions)
    return (
        f"so no answer is better than another, and nothing is trained.{also} See whether {names} can tell answers apart, and read "
        "samples in rollouts/ or report.html"
    )


def _why_no_spread(config: RunConfig, tally: Tally) -> str:
    rollout = config.rollout
    if rollout.num_generations == 1:
        return "rollout.num_generations is 1, and a sample is compared with the others of its prompt; use 8, say"
    mend = (
        f"rollout.temperature is {rollout.temperature:g}, at which samples hardly differ: use 1"
        if rollout.temperature < 0.3
        else "raise rollout.num_generations, use prompts that are neither too hard nor too easy, and see whether the reward "
        "depends on the answer rather than on the prompt alone"
    )
    return (
        f"all samples of a prompt have the same reward, in each of {tally.groups} groups, though prompts differ "
        f"({tally.rewards.lowest:g} to {tally.rewards.highest:g}); {mend}"
    )


def _why_no_gradient(a: AlgorithmConfig) -> str:
    masks = {
        f"importance_sampling ({a.importance_sampling})": str(a.importance_sampling).endswith("_mask"),
        "geometric_mask": a.geometric_mask is not None,
        "off_policy_mask_threshold": a.off_policy_mask_threshold is not None,
    }
    if any(masks.values()):
        named = " and ".join(f"algorithm.{name}" for name, on in masks.items() if on)
        return f"{named} may leave every token out; see correction/masked_tokens and mismatch/mean_abs, and widen the bounds"
    return "every token is clipped, or its gradient rounds to 0; see clip/low, clip/high and mismatch/mean_abs"
