"""What `grpo_ray.tasks.r1` was called before: users' own modules import it by this name."""

from grpo_ray.tasks.r1 import Flaws, base_text, greeting_pairs, greetings, kind_greeting, prompts

__all__ = ["Flaws", "base_text", "greeting_pairs", "greetings", "kind_greeting", "prompts"]
