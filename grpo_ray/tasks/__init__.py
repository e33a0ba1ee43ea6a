"""Tasks of the shipped recipes, made on the spot: arithmetic.py for `smoke`, r1.py for `r1_tiny`.

Recipes name their functions, also by the names of before, `grpo_ray.tasks.arithmetic` and `grpo_ray.tasks.r1`. Imports `rewards`
and the modules at the root of `grpo_ray`.
"""
