"""Reward workers: scoring in processes that can be killed.

Read pool.py (all workers as one `Scorer`) with requests.py and worker.py, by_function.py (several pools), actor.py (one
worker), process.py and processes.py (the parent's end of a scoring process), child.py (what runs in it) and apart.py (no
network).

Imports the modules at the root of `actors`.
"""
