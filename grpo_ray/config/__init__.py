"""The options of a run: their schema, where every default is stated once, and the conversion between YAML and the schema.

Read schema.py and common.py, with one file per section; then loading.py (files and `key=value`), yaml.py and typed.py (the
meaning of values), aliases.py (the names of options in other projects), presets.py, places.py, scaling.py, and effects.py, which
finds the options that have no effect in a run.

This package imports only the modules at the root of `grpo_ray`.
"""
