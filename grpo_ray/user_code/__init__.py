"""The functions that a recipe names: who may own them, and what their source says before any of it is run.

Read functions.py, then places.py (whose functions a recipe may name), source.py (where a name leads), files.py and modules.py.

This package imports only the modules at the root of `grpo_ray`.
"""
