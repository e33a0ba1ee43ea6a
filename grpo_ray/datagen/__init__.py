"""Training data made of samples: filters/ choose answers, judged_pairs.py makes preferences of them.

Imports `run`, `rewards`, `data`, `config` and the modules at the root of `grpo_ray`.
"""
