"""The algorithms: advantages of scored samples, the training batch, and the objective of each micro-batch.

Read advantages.py, train_batch.py, objectives.py with losses/ (one objective a file), then objectives_pairs.py and mismatch.py.

Imports `config`, `batch` and the modules at the root of `grpo_ray`.
"""
