"""Rewards: the value of a sample. Each has a file; `table.BUILTINS` lists those that recipes select by name.

Read functions/function.py (the contract, which is TRL's) and table.py; then any reward, e.g. accuracy.py. functions/ finds, creates
and calls functions, answers/ reads answers, endpoints/ queries other models. columns.py compares rewards and data before a run.

This package imports `data`, `config`, `sandbox`, `user_code` and the modules at the root of `grpo_ray`.
"""
