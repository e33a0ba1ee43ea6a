"""Is there anything to learn from? Told in words after every step, with the cause and the mend. Pure.

Read watch.py, then tally.py (what the scores of a step say), collapse.py, untrained.py, applicable.py and causes.py.

Imports `rewards`, `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""
