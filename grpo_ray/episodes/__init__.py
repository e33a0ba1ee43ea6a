"""Episodes: conversations of several turns, token by token. Ids go in and ids come out; what a model wrote is never tokenized
again.

Read suffix.py (the ids of what an environment says between two turns), then templates.py (chat templates that write every turn as
it was sampled).

This package imports `data` and the modules at the root of `grpo_ray`.
"""
