"""Samples as the learner computes them: packed into micro-batches, without padding.

Read plan.py (samples -> mini-batches -> ranks), pack.py (packed micro-batches), then segments.py (which token is of which
sequence), sequence.py (slices of a micro-batch over several ranks) and truncation.py (which tokens could have been sampled).

Imports the modules at the root of `grpo_ray` alone.
"""
