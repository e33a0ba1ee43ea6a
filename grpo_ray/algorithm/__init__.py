"""The algorithms: advantages of scored samples, the training batch, and the objective of each micro-batch.

Read advantages.py, train_batch.py, objectives.py with losses/ (one objective a file), then objectives_pairs.py and mismatch.py;
users.py, declare.py and users_called.py are about a loss and an advantage of a recipe's own.

Imports `config`, `batch`, `user_code` and the modules at the root of `grpo_ray`.
"""
