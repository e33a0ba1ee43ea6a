"""Health checks of a run: whether there is anything to learn from, reported after every step with cause and fix. Pure.

Read watch.py, then tally.py (counts of a step's scores), collapse.py, untrained.py, applicable.py and causes.py.

Imports `rewards`, `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""
