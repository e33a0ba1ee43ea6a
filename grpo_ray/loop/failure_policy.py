"""The policy `reward.on_failure`: what happens to a group whose scores failed, and how many failures end the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import RewardError
from grpo_ray.types import Group, Score

DROPPED = "reward_failed"
"""The reason for a dropped group in metrics; the ledger names the kind of failure."""
MIN_GROUPS = 4
"""The least number of groups against whose scores failures are counted: one bad prompt does not end the run, and a function that
always hangs is found soon.
"""


@dataclass
class StepCounts:
    """Counts of what happened while the batch of one step was collected."""

    scored: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    """The number of failed scores by reward function."""
    dropped: dict[str, int] = field(default_factory=dict)
    """The number of dropped groups by reason."""
    last_failure: str = ""
    from_checkpoint: int = 0
    """The number of groups that were sampled before the run was resumed."""

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def score(self, group: Group) -> None:
        self.scored += len(group.scores)
        for score in _failed(group):
            part = next((p for p in score.parts if p.status.failed), None)
            name = part.name if part else "reward"
            self.failed[name] = self.failed.get(name, 0) + 1
            self.last_failure = f"{name}: {score.status}: {score.detail}"


def apply_failure_policy(group: Group, counts: StepCounts, config: RunConfig, step: int) -> str | None:
    """Count the scores of a group, and give the failed ones the value that the policy sets.

    Args:
        step: the step that collects the group; the first is 1.

    Returns:
        The reason why the group is to be dropped, as the ledger records it; None if it is kept.

    Raises:
        RewardError: more scores of the step failed than `reward.on_failure.abort_above` allows.
    """
    policy = config.reward.on_failure
    counts.score(group)
    num_failed = sum(counts.failed.values())
    enough = min(config.prompts_per_step, MIN_GROUPS) * config.rollout.num_generations
    if num_failed > policy.abort_above * max(counts.scored, enough):
        raise RewardError(
            f"{num_failed} of {counts.scored} scores of step {step} failed, more than reward.on_failure.abort_above "
            f"({policy.abort_above:g}) allows; the last one: {counts.last_failure}"
        )
    failed = _failed(group)
    if not failed:
        return None
    if policy.action == "value":
        group.scores = [
            Score(status=s.status, value=policy.value, parts=s.parts, detail=s.detail) if s.status.failed else s
            for s in group.scores
        ]
        return None
    # What failed has no number, and so no part in anything; there is nothing to set.
    if policy.action == "drop_sample" and len(failed) < len(group.scores):
        return None
    counts.drop(DROPPED)
    return f"reward_{failed[0].status}"


def refuse_rewards_of_steps(group: Group, algorithm: AlgorithmConfig) -> None:
    """Raise RewardError for step rewards where the algorithm would silently train on their sum."""
    kind = algorithm.advantage
    name = next((p.name for s in group.scores for p in s.parts if p.steps), None)
    if name is not None and kind != "process":
        raise RewardError(
            f"reward {name!r} gives rewards of steps, and algorithm.advantage {kind} compares rewards of whole samples; use "
            "algorithm.advantage process, or return the sum"
        )


def _failed(group: Group) -> list[Score]:
    return [s for s in group.scores if s.status.failed]
