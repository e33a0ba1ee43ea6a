"""The options of a run: their schema, where every default stands once, and the way from YAML to it and back.

Read schema.py and common.py, with one file a section; then loading.py (files and `key=value`), yaml.py and typed.py (what they
mean), aliases.py (what other projects call an option), presets.py, places.py, scaling.py, and effects.py, which knows the
options that do nothing in a run.

Imports the modules at the root of `grpo_ray` alone.
"""
