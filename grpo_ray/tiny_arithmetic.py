"""The earlier name of `grpo_ray.tasks.arithmetic`, by which users' own modules import it."""

from grpo_ray.tasks.arithmetic import Flaws, demonstrate, flawed_demonstrations

__all__ = ["Flaws", "demonstrate", "flawed_demonstrations"]
