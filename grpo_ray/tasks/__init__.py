"""Generated tasks of the shipped recipes: arithmetic.py for `smoke`, r1.py for `r1_tiny`.

Recipes name their functions, also by their earlier names `grpo_ray.tiny_arithmetic` and `grpo_ray.tiny_r1`.

Imports `rewards` and the modules at the root of `grpo_ray`.
"""
