"""What a loaded model is held against before it is trained: agreement.py compares the path on which it goes with its own forward.

This package imports the modules of `grpo_ray.models` and what they import.
"""
