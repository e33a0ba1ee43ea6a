"""Training data generated from samples: filters/ select answers, judged_pairs.py makes preference pairs of them.

Imports `run`, `rewards`, `data`, `config` and the modules at the root of `grpo_ray`.
"""
