"""What `grpo_ray.tasks.arithmetic` was called before: users' own modules import it by this name."""

from grpo_ray.tasks.arithmetic import Flaws, demonstrate, flawed_demonstrations

__all__ = ["Flaws", "demonstrate", "flawed_demonstrations"]
