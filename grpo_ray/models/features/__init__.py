"""What some families of models do and others do not: logits that are capped or scaled, attention sinks, positions that depend on
lengths, noise in training.

This package imports `linear` of `models`, and nothing else of it.
"""
