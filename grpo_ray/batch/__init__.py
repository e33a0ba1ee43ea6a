"""Micro-batches: samples packed end to end, without padding.

Read plan.py (samples -> mini-batches -> ranks), pack.py (packed micro-batches), then segments.py (the sequence of each token),
sequence.py (slices of a micro-batch over several ranks), truncation.py (the tokens that could have been sampled) and slopes.py
(what the head is told of a loss).

Imports the modules at the root of `grpo_ray` alone.
"""
