"""The earlier name of `grpo_ray.tasks.r1`, by which users' own modules import it."""

from grpo_ray.tasks.r1 import Flaws, base_text, greeting_pairs, greetings, kind_greeting, prompts

__all__ = ["Flaws", "base_text", "greeting_pairs", "greetings", "kind_greeting", "prompts"]
