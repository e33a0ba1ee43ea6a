"""`grpo-ray check`: everything that can be validated without loading a model.

Read command.py, then golds.py, large.py with overview.py, and model.py.

Imports `launch.pipeline.stages`, `launch.run` and the modules at the root of `launch`.
"""
