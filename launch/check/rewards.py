"""What `check` says of how reward functions are called."""

from __future__ import annotations

from grpo_ray.config.reward import RewardConfig
from grpo_ray.rewards.table import described


def called(reward: RewardConfig, num_generations: int, *, imports: bool) -> str:
    """The arguments that the reward functions are called with."""
    found = [described(f, imports=imports) for f in reward.functions]
    whole = [f.name for f in found if not f.per_sample]
    group, one = f"the {num_generations} samples of a group at once", "one sample, the moment it is drawn"
    at_hand = "all samples that a worker has at hand"
    own = [f.title for f in reward.functions if f.workers is not None]
    rest = f"; {', '.join(own)} with {at_hand}, of workers of its own" if own else ""
    match reward.unit:
        case "auto" if whole and len(whole) < len(found):
            text = f"with {group}: {', '.join(whole)}; the others sample by sample, when the group is complete"
        case "auto":
            text = f"with {group}" if whole else f"with {one}"
        case unit:
            text = f"with {({'sample': one, 'group': group, 'batch': at_hand})[unit]} (reward.unit {unit})"
    return text + rest
