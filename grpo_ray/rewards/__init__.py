"""What a sample is worth. One file per reward; `table.BUILTINS` is the list that recipes choose from by name.

Read functions/function.py (the contract, which is TRL's) and table.py; then any reward, e.g. accuracy.py. functions/ has what
finds, makes and calls a function, answers/ what reads an answer, endpoints/ what asks another model. columns.py compares
rewards and data before a run.

Imports `data`, `config`, `sandbox`, `user_code` and the modules at the root of `grpo_ray`.
"""
