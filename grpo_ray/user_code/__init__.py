"""The functions that a recipe names: whose they may be, and what their source says before anything of it is run.

Read functions.py, then places.py (whose functions a recipe may name), source.py (where a name leads), files.py and modules.py.

Imports nothing else of `grpo_ray`.
"""
