"""The memory that a run will need, before anything is loaded.

Read estimate.py (each kind of worker's parts, in bytes) first; kv_cache.py (samples that a rollout engine's cache holds), fit.py
(what fits a machine without GPUs) and gpu_fit.py (what fits GPUs, also ones that are not here) build on it.

This package imports `config` and, of `models`, model_files.py and tiny.py.
"""
